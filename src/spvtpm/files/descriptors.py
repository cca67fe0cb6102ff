"""How many descriptors a process may have."""

from __future__ import annotations

import resource


def raise_descriptor_limit() -> None:
    """Takes as many as this user may have: a daemon needs some for each vTPM, machine, connection or relay."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
