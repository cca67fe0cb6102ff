"""QEMU's command line for a VM. Pure but for a look at which files there are.

Source: QEMU, docs/system/invocation.rst.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spvtpm.hypervisor.config import QemuConfig
from spvtpm.hypervisor.qemu_firmware import VARIABLES, Firmware, find_firmware
from spvtpm.hypervisor.virtual_machine import Boot
from spvtpm.wire.platform_errors import MachineFailed

MARK: Final = "-name"
"""Is followed by the machine's directory, by which its process is found again."""

SERIAL: Final = "serial"
SERIAL_BYTES: Final = 65_536

_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny"


@dataclass(frozen=True, slots=True)
class Images:
    """What a VM boots from.

    Attributes:
        kernel: a Linux kernel, with `append` as its command line; None: its disk boots.
        initramfs: for the kernel.
        disk: a qcow2 image, which the VM writes to.
        firmware: what boots them; None: QEMU's BIOS.
    """

    kernel: Path | None
    initramfs: Path | None
    disk: Path | None
    firmware: Firmware | None = None


def find_images(config: QemuConfig, directory: Path, vm_id: uuid.UUID) -> Images:
    """The VM's own images, or those of all VMs.

    Args:
        config: of QEMU.
        directory: the agent's; paths in the configuration begin there.
        vm_id: the VM.

    Raises:
        MachineFailed: there is nothing to boot, or firmware is missing.
    """
    images = directory / config.images

    def first(*names: str) -> Path | None:
        return next((images / name for name in names if (images / name).is_file()), None)

    found = Images(
        kernel=directory / config.kernel if config.kernel else None,
        initramfs=first(f"{vm_id}.initramfs", "default.initramfs") if config.kernel else None,
        disk=first(f"{vm_id}.qcow2"),
        firmware=find_firmware(config, directory),
    )
    if found.kernel is None and found.disk is None:
        raise MachineFailed(
            f"VM {vm_id} has nothing to boot: there is no {images / f'{vm_id}.qcow2'}, and no kernel is set"
        )
    return found


def qemu_command(config: QemuConfig, images: Images, own: Path, boot: Boot) -> list[str]:
    """The words of the command.

    Args:
        config: of QEMU.
        images: what it boots from.
        own: the machine's directory.
        boot: that it takes part in.
    """
    command = [
        config.program,
        MARK,
        _escaped(own),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-nic",
        "none",
    ]
    command += ["-machine", "q35", "-cpu", "max", "-smp", str(config.cpus), "-m", str(config.memory_mib)]
    for accelerator in ("kvm", "tcg") if config.accelerator == "auto" else (config.accelerator,):
        command += ["-accel", accelerator]  # the first that can be had
    command += ["-qmp", f"unix:{_escaped(monitor_of(own))},server=on,wait=off", "-sandbox", _SANDBOX]
    command += ["-chardev", f"ringbuf,id={SERIAL},size={SERIAL_BYTES}", "-serial", f"chardev:{SERIAL}"]
    command += ["-action", "reboot=shutdown"]  # each boot has to be one of the vTPM, too
    if images.firmware is not None:
        for unit, flash in enumerate((f"{_escaped(images.firmware.code)},readonly=on", _escaped(variables_of(own)))):
            command += ["-drive", f"if=pflash,unit={unit},format=raw,file={flash}"]
    if images.kernel is not None:
        command += ["-kernel", str(images.kernel), "-append", config.append]
    if images.initramfs is not None:
        command += ["-initrd", str(images.initramfs)]
    if images.disk is not None:
        command += ["-drive", f"file={_escaped(images.disk)},format=qcow2,if=virtio"]
    if boot.interface is not None and config.tpm == "emulator":
        command += ["-chardev", f"socket,id=vtpm,path={_escaped(boot.interface)}"]
        command += ["-tpmdev", "emulator,id=tpm,chardev=vtpm", "-device", "tpm-crb,tpmdev=tpm"]
    elif boot.interface is not None:
        command += ["-chardev", f"socket,id=vtpm,path={_escaped(boot.interface)}"]
        # The master's machine can be saved; a peer's cannot. It is no master of anybody, for it is the only peer.
        command += ["-device", "ivshmem-doorbell,chardev=vtpm,vectors=1,master=on"]
    if boot.resumes:
        command += ["-incoming", "defer", "-S"]
    return command


def monitor_of(own: Path) -> Path:
    """Where its monitor listens."""
    return own / "qmp.sock"


def variables_of(own: Path) -> Path:
    """Where the variables of its firmware are: not in its own directory, which is cleared when the machine is gone."""
    return own.with_name(VARIABLES)


def _escaped(path: Path) -> str:
    """In a list of options a comma is written twice."""
    return str(path).replace(",", ",,")
