"""Moves a running vTPM from one secure processor to another, so that at every moment at most one runs it, and in the end one does."""
