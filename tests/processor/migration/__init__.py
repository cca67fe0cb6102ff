"""Migration between secure processors."""
