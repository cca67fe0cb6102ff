"""UEFI firmware of QEMU guests: its code, which they share, and its variables, of which each VM has its own.

Source: edk2, OvmfPkg/README; flash unit 0 has the code, unit 1 the variables, which the firmware and the guest write.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spvtpm.files import create_file, read_file
from spvtpm.hypervisor.config import QemuConfig
from spvtpm.wire.platform_errors import MachineFailed

VARIABLES: Final = "firmware-variables"

_MAX_FLASH_BYTES: Final = 8 << 20
"""Source: QEMU, hw/i386/pc.c, `max-fw-size` of its machines, by default; of code and variables together."""


@dataclass(frozen=True, slots=True)
class Firmware:
    """What a VM's firmware is.

    Attributes:
        code: an image that nobody writes to.
        template: variables, as a VM has them before its first boot.
    """

    code: Path
    template: Path


def find_firmware(config: QemuConfig, directory: Path) -> Firmware | None:
    """The firmware of all VMs; None: QEMU's own, a BIOS.

    Args:
        config: of QEMU.
        directory: the agent's; paths in the configuration begin there.

    Raises:
        MachineFailed: a file of it is missing.
    """
    if not config.firmware:
        return None
    found = Firmware(directory / config.firmware, directory / config.firmware_variables)
    for key, path in ("firmware", found.code), ("firmware_variables", found.template):
        if not path.is_file():
            raise MachineFailed(f"there is no file {path}, which agent.toml names as {key}; Debian's package is ovmf")
    return found


def provide_variables(firmware: Firmware, path: Path, uid: int) -> None:
    """Gives a VM variables of its own, unless it has them, durably.

    Args:
        firmware: of the VM.
        path: where they are.
        uid: who may read and write them.

    Raises:
        StorageError: they cannot be written, or the template cannot be read.
        OSError: they cannot be given to that user.
    """
    if not path.exists():
        create_file(path, read_file(firmware.template.resolve(), _MAX_FLASH_BYTES, private=False))
    os.chown(path, uid, -1)
