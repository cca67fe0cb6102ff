"""The VM's key as the VM has it. Today a file, a stopgap until the owner's launch secret brings it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from spvtpm.wire.errors import AlreadyExists, StorageError, VmKeyError
from spvtpm.wire.mailbox import KEY_BYTES


def create_vm_key(path: Path) -> None:
    """Writes a new random VM key, 32 bytes, mode 0600.

    Raises:
        AlreadyExists: there is a file already.
        StorageError: it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
    except FileExistsError:
        raise AlreadyExists(f"{path} exists already: a key is never replaced") from None
    except OSError as error:
        raise StorageError(f"cannot write the VM key {path}: {error.strerror}") from None


def read_vm_key(path: Path) -> bytes:
    """Reads a VM key.

    Raises:
        VmKeyError: it cannot be read, is no VM key, or others could read it too.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(KEY_BYTES + 1)
    except OSError as error:
        raise VmKeyError(f"cannot read the VM key {path}: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise VmKeyError(f"the VM key {path} can be read by others: its mode must be 0600")
    if len(key) != KEY_BYTES:
        raise VmKeyError(f"{path} is no VM key: it must hold {KEY_BYTES} bytes")
    return key
