"""Hostile bytes for every parser: `make fuzz` runs these targets long, tests/test_fuzz.py a moment each."""
