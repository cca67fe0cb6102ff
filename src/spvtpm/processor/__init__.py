"""The secure processor: everything that may hold the chip's secrets. May import `engine` and `wire`, nothing else of ours."""
