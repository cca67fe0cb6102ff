"""The vendor: makes chips and vouches for them. Trusted by everyone, offline, knows the wire alone."""
