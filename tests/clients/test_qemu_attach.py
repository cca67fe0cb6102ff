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
from tests.harness import RunningSp, is_root

USER = 54321
QEMU = shutil.which("qemu-system-x86_64")

pytestmark = pytest.mark.skipif(QEMU is None, reason="QEMU is not installed (package qemu-system-x86)")


def command(interface: Path, *more: str) -> list[str]:
    """A stopped machine with nothing but the device."""
    return [
        *(str(QEMU), "-nodefaults", "-display", "none", "-S", "-m", "64", *more),
        *("-chardev", f"socket,path={interface},id=interface"),
        *("-device", "ivshmem-doorbell,chardev=interface,vectors=1,id=vtpm"),
    ]


@contextmanager
def qemu(interface: Path, directory: Path, user: int | None = None) -> Iterator[Qmp]:
    """Runs it, as another user if need be."""
    monitor = directory / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(monitor))
        monitor.chmod(0o666)
        listener.listen(1)
        listener.settimeout(60)
        process = subprocess.Popen(command(interface, "-qmp", f"unix:{monitor}"), stdin=subprocess.DEVNULL, user=user)
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


@pytest.mark.attack("A27")
@pytest.mark.skipif(not is_root(), reason="only root may start a QEMU of another user")
def test_only_a_qemu_of_a_user_who_is_allowed_gets_the_interface(state_directory: Path) -> None:
    with RunningSp(state_directory, config=f"allowed_uids = [0, {USER}]\n") as sp:
        vm_id = sp.launch()
        state_directory.parent.chmod(0o711)
        refused = subprocess.run(
            command(sp.interface(vm_id)), user=USER + 1, capture_output=True, text=True, timeout=60
        )
        assert refused.returncode == 1, refused
        with qemu(sp.interface(vm_id), state_directory.parent, USER) as monitor:
            assert memory_bars(monitor)[2] == crb.MEMORY_BYTES
    assert f"refused a connection of uid {USER + 1}" in sp.log()
