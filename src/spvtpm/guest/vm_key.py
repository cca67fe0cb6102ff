"""The VM's key as the VM has it: a file that its owner put there."""

from __future__ import annotations

import os
from pathlib import Path

from spvtpm.files import create_file, read_file
from spvtpm.wire.errors import AlreadyExists, StorageError, VmKeyError
from spvtpm.wire.mailbox import KEY_BYTES


def create_vm_key(path: Path) -> None:
    """Writes a new random VM key, 32 bytes, mode 0600.

    Raises:
        AlreadyExists: there is a file already.
        StorageError: it cannot be written.
    """
    try:
        create_file(path, os.urandom(KEY_BYTES))
    except AlreadyExists:
        raise AlreadyExists(f"{path} exists already: a key is never replaced") from None


def read_vm_key(path: Path) -> bytes:
    """Reads a VM key.

    Raises:
        VmKeyError: it cannot be read, is no VM key, or others could read it too.
    """
    try:
        key = read_file(path, KEY_BYTES)
    except StorageError as error:
        raise VmKeyError(f"no VM key: {error}") from None
    if len(key) != KEY_BYTES:
        raise VmKeyError(f"{path} is no VM key: it must hold {KEY_BYTES} bytes")
    return key
