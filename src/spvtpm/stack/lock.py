"""One `spvtpm up` at a time on a directory; the lock is held by its parts, too, and so until the last of them has ended."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from spvtpm.files.state_lock import open_lock
from spvtpm.stack.making import Tell
from spvtpm.wire.errors import StateInUse

_MAX_PID_BYTES: Final = 20


@contextmanager
def stack_lock(directory: Path, tell: Tell) -> Iterator[int]:
    """Holds the directory; gives the descriptor that parts have to inherit.

    If an `spvtpm up` was killed, its parts are still ending: this waits for them.

    Raises:
        StateInUse: one runs on it.
        StorageError: the directory cannot be used.
    """
    descriptor = open_lock(directory)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _holder(descriptor)
            if pid is not None and _runs(pid):
                raise StateInUse(f"another spvtpm up runs on {directory}: process {pid}") from None
            tell("the last spvtpm up here was killed; its parts are still ending")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> int | None:
    with suppress(ValueError):
        return int(os.pread(descriptor, _MAX_PID_BYTES, 0))
    return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
