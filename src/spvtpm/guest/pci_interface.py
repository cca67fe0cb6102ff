"""The vTPM's interface inside a Linux guest: QEMU's `ivshmem-doorbell` device, through the files that Linux has of it.

| BAR | content |
| --- | --- |
| 0 | registers; a write to the doorbell rings the SP |
| 2 | the memory that VM and SP share |

No driver of the kernel is bound to the device, and none may be. Its interrupt is left alone: who waits looks at the memory.

Source: QEMU, docs/specs/ivshmem-spec.rst, "Device-specific PCI memory"; Linux, Documentation/PCI/sysfs-pci.rst.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from mmap import PAGESIZE, mmap
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from spvtpm.guest._crb_driver import ffi, lib
from spvtpm.wire import crb
from spvtpm.wire.crb import Register
from spvtpm.wire.errors import InterfaceError

DEVICES: Final = Path("/sys/bus/pci/devices")

_VENDOR: Final = 0x1AF4
_DEVICE: Final = 0x1110
"""Source: QEMU, docs/specs/ivshmem-spec.rst, "Device Configuration"."""

_DOORBELL: Final = 0x0C
"""Offset in BAR 0. Source: as above, "Device Registers"."""

_FIRST_NAP_S: Final = 0.0001
_LONGEST_NAP_S: Final = 0.01


class PciInterface:
    """A vTPM's interface as a PCI device. An `Interface` of `crb_driver.py`. Life: `find()` → … → `close()`.

    Args:
        device: the device's directory.

    Raises:
        InterfaceError: it cannot be mapped, or is no vTPM's interface.
    """

    def __init__(self, device: Path) -> None:
        self.is_open = True
        self._page = ffi.NULL
        try:
            _enable(device)
            self.memory = _map_memory(device)
            self._page, offset = _map_registers(device)
        except (OSError, ValueError) as error:
            self.close()
            raise InterfaceError(f"cannot map the PCI device {device.name}: {error}") from None
        except InterfaceError:
            self.close()
            raise
        self._register = int(ffi.cast("uintptr_t", self._page)) + offset + _DOORBELL

    @classmethod
    def find(cls, devices: Path = DEVICES) -> Self:
        """The interface of this VM.

        Args:
            devices: where Linux has all PCI devices.

        Raises:
            InterfaceError: there is none, or more than one.
        """
        found, refused = list[Self](), list[InterfaceError]()
        for device in sorted(path for path in devices.glob("*") if _is_ivshmem(path)):
            try:
                found.append(cls(device))
            except InterfaceError as error:
                refused.append(error)
        if len(found) == 1:
            return found[0]
        for interface in found:
            interface.close()
        if found:
            raise InterfaceError(f"{len(found)} PCI devices are a vTPM's interface; a VM has one")
        if refused:
            raise refused[0]
        raise InterfaceError("this machine has no vTPM interface: no PCI device 1af4:1110")

    @property
    def doorbell(self) -> int:
        """There is none: it is a register."""
        return -1

    @property
    def doorbell_register(self) -> int:
        """Address of the register that rings the SP."""
        return self._register

    def wait(self, timeout_s: float) -> bool:
        """Waits until no command is under way; False: one is still, after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        nap_s = _FIRST_NAP_S
        while crb.U32.unpack_from(self.memory, Register.CTRL_START) != (0,):
            if time.monotonic() >= deadline:
                return False
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)
        return True

    def close(self) -> None:
        """Unmaps it. Whoever has a driver on it lets that go first."""
        self.is_open = False
        if self._page != ffi.NULL:
            lib.registers_unmap(self._page)
            self._page = ffi.NULL
        if hasattr(self, "memory"):
            with suppress(BufferError):  # a driver still refers to it: unmapped when that goes
                self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_ivshmem(device: Path) -> bool:
    try:
        return (_number(device / "vendor"), _number(device / "device")) == (_VENDOR, _DEVICE)
    except (OSError, ValueError):  # it has been unplugged meanwhile
        return False


def _number(path: Path) -> int:
    return int(path.read_text(), 16)


def _enable(device: Path) -> None:
    """Has the device answer to accesses to its memory, which a driver of the kernel would do otherwise."""
    if (device / "enable").read_text().strip() == "0":
        (device / "enable").write_text("1")


def _map_memory(device: Path) -> mmap:
    """BAR 2, uncached as its file is without `_wc`: writes arrive in order."""
    descriptor = os.open(device / "resource2", os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size != crb.MEMORY_BYTES:
            raise InterfaceError(f"the PCI device {device.name} shares {size} bytes, so it is no vTPM's interface")
        memory = mmap(descriptor, crb.MEMORY_BYTES)
    finally:
        os.close(descriptor)
    if memory[crb.ATTACH_OFFSET :][: len(crb.ATTACH_MAGIC)] != crb.ATTACH_MAGIC:
        memory.close()
        raise InterfaceError(f"the memory of the PCI device {device.name} is no vTPM's interface")
    return memory


def _map_registers(device: Path) -> tuple[ffi.CData, int]:
    """The page in which BAR 0 begins, and where in it: a BAR may be smaller than a page, and Linux maps whole ones."""
    first = (device / "resource").read_text().splitlines()[0]
    start = int(first.split()[0], 16)
    descriptor = os.open(device / "resource0", os.O_RDWR | os.O_CLOEXEC)
    try:
        page = lib.registers_map(descriptor)
    finally:
        os.close(descriptor)
    if page == ffi.NULL:
        raise InterfaceError(f"Linux does not let this process map the registers of the PCI device {device.name}")
    return page, start % PAGESIZE
