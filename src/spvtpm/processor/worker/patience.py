"""Whoever makes a blank TPM, for some later vTPM, lets those go first who serve a guest now."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

_NICE = 10
_RLIMIT_OF_NICE_0 = 20
"""A process may go back as far as nice 20 - limit. Source: getrlimit(2), RLIMIT_NICE."""

_may_go_back = False


def allow_going_back() -> None:
    """For the zygote, while it may still raise limits, as root's can: else workers never step back, as they could not return."""
    global _may_go_back  # noqa: PLW0603  # what the kernel granted to this process and its children
    try:
        resource.setrlimit(resource.RLIMIT_NICE, (_RLIMIT_OF_NICE_0, _RLIMIT_OF_NICE_0))
    except (OSError, ValueError):
        return
    _may_go_back = True


@contextmanager
def stepping_back() -> Iterator[None]:
    """The body runs when nobody else wants to."""
    if not _may_go_back:
        yield
        return
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
