"""Models that a checker walks through whole, of what must not go wrong in any order of events."""
