"""The database's revisions, each a step from the one before. Never changed once released."""
