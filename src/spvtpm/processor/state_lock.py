"""One process at a time on a state directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from spvtpm.wire.errors import StateInUse, StorageError


def lock_state(state: Path) -> int:
    """Takes the state directory for this process; closing the returned descriptor gives it back.

    Raises:
        StateInUse: another process has it.
        StorageError: the directory cannot be used.
    """
    try:
        descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(f"cannot open {state / 'lock'}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateInUse(f"another process uses {state}") from None
    return descriptor
