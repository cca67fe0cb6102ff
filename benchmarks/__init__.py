"""Side by side with the system's swtpm, in one run: `python -m benchmarks`. Prints medians and ratios; tests nothing.

One Python process drives both, in turns (ours, theirs, ours, …), so that a machine whose speed drifts is as kind to one
as to the other. Memory alone is weighed one after the other, as neither should share the other's pages.
"""
