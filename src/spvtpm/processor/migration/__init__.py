"""Moves a running vTPM to another secure processor: at every moment at most one runs it, and in the end one does."""
