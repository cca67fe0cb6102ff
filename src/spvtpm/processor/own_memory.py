"""The SP's own memory: no core dump, no reading by processes of the same user, no swap where the kernel allows."""

from __future__ import annotations

import resource

from spvtpm.processor.worker import linux


def protect_own_memory() -> list[str]:
    """Closes the ways by which secrets leave this process unasked.

    Returns:
        Sentences naming what could not be had.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    linux.set_dumpable(False)
    try:
        linux.lock_memory()
    except OSError as error:
        return [f"this process may be swapped out ({error.strerror}): use encrypted swap, or none"]
    return []
