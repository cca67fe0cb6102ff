"""How the SP learns a VM's memory key. Today a file, a stopgap until the owner sends it through a confidential channel.

Nothing else depends on where the key comes from: the rest of the SP calls `VmKeys.boot_key`.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Protocol

from spvtpm.files import read_file
from spvtpm.wire.errors import StorageError, VmKeyError
from spvtpm.wire.mailbox import KEY_BYTES, derive_boot_key


class VmKeys(Protocol):
    """Gives boot keys; the VM key itself goes no further."""

    def boot_key(self, vm_id: uuid.UUID, boot_id: bytes) -> bytes:
        """The 32-byte key of one boot.

        Raises:
            VmKeyError: the VM's key is not known.
        """


class VmKeyFiles:
    """VM keys in files `<vm id>.key` of 32 bytes, mode 0600, put there by whoever owns the VM.

    Args:
        directory: where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def boot_key(self, vm_id: uuid.UUID, boot_id: bytes) -> bytes:
        path = self._directory / f"{vm_id}.key"
        try:
            key = read_file(path, KEY_BYTES)
        except StorageError as error:
            raise VmKeyError(f"the VM's key: {error}") from None
        if len(key) != KEY_BYTES:
            raise VmKeyError(f"{path} holds {len(key)} bytes, not a VM key of {KEY_BYTES}")
        return derive_boot_key(key, vm_id.bytes, boot_id)
