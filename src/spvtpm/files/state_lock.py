"""One process at a time on a state directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from spvtpm.wire.errors import StateInUse, StorageError


def open_lock(state: Path) -> int:
    """Opens the file that is locked, and makes it if it is missing; the caller closes the descriptor.

    Raises:
        StorageError: the directory cannot be used.
    """
    path = state / "lock"
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}") from None


def lock_state(state: Path, who: str = "process") -> int:
    """Takes the state directory for this process; closing the returned descriptor gives it back.

    Args:
        state: the directory.
        who: may be there once, for the sentence.

    Raises:
        StateInUse: another one has it.
        StorageError: the directory cannot be used.
    """
    descriptor = open_lock(state)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateInUse(f"another {who} uses {state}") from None
    return descriptor
