"""An unmodified QEMU takes a vTPM's interface as its `ivshmem-doorbell` device: the memory is there as a PCI BAR."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import crb, messages
from spvtpm.wire.errors import StateInUse
from tests.guests.qmp import Qmp
from tests.harness import RunningSp

QEMU = shutil.which("qemu-system-x86_64")

pytestmark = pytest.mark.skipif(QEMU is None, reason="QEMU is not installed (package qemu-system-x86)")


@contextmanager
def qemu(interface: Path, directory: Path) -> Iterator[Qmp]:
    """A stopped machine with nothing but the device."""
    monitor = directory / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(monitor))
        listener.listen(1)
        listener.settimeout(60)
        process = subprocess.Popen(
            [
                *(str(QEMU), "-nodefaults", "-display", "none", "-S", "-m", "64", "-qmp", f"unix:{monitor}"),
                *("-chardev", f"socket,path={interface},id=interface"),
                *("-device", "ivshmem-doorbell,chardev=interface,vectors=1,id=vtpm"),
            ],
            stdin=subprocess.DEVNULL,
        )
        try:
            with listener.accept()[0] as connection:
                yield Qmp(connection)
        finally:
            process.kill()
            process.wait()


def memory_bars(monitor: Qmp) -> dict[int, int]:
    """Size of each memory BAR of the device."""
    devices = [device for bus in monitor.do("query-pci") for device in bus["devices"]]
    (vtpm,) = (device for device in devices if device["qdev_id"] == "vtpm")
    return {region["bar"]: region["size"] for region in vtpm["regions"] if region["type"] == "memory"}


@pytest.mark.claim("C1")
def test_qemu_maps_the_interface_and_holds_it_until_it_ends(sp: RunningSp, state_directory: Path) -> None:
    vm_id = sp.launch()
    with qemu(sp.interface(vm_id), state_directory.parent) as monitor:
        # Source: QEMU, docs/specs/ivshmem-spec, "Device-specific PCI memory": BAR 2 is the shared memory.
        assert memory_bars(monitor)[2] == crb.MEMORY_BYTES
        vtpm = sp.vm(vm_id).vtpm
        assert vtpm is not None
        assert vtpm.connected
        with pytest.raises(StateInUse, match="another process holds the interface"):
            InterfaceMemory.connect(sp.interface(vm_id), timeout_s=0.2)

        sp.info(messages.ResetVm(vm_id=vm_id))
        assert memory_bars(monitor)[2] == crb.MEMORY_BYTES

    InterfaceMemory.connect(sp.interface(vm_id)).close()
