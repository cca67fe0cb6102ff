"""The interface as a PCI device: found among others, refused if it is no vTPM's, rung through its register."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from mmap import PAGESIZE
from pathlib import Path

import pytest

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.pci_interface import PciInterface
from spvtpm.wire import crb
from spvtpm.wire.crb import Register
from spvtpm.wire.errors import InterfaceError
from spvtpm.wire.ivshmem import SP_PEER

BAR0 = 0xFEBD5100
DOORBELL = BAR0 % PAGESIZE + 0x0C
UNTOUCHED = 0xEE


def make_device(devices: Path, address: str, *, vendor: int = 0x1AF4, device: int = 0x1110) -> Path:
    """A device as Linux shows it in sysfs, with files in the place of its BARs."""
    directory = devices / address
    directory.mkdir(parents=True)
    for name, content in (
        ("vendor", f"{vendor:#06x}\n"),
        ("device", f"{device:#06x}\n"),
        ("enable", "0\n"),
        ("resource", f"{BAR0:#018x} {BAR0 + 0xFF:#018x} 0x0000000000040200\n" + "0x0 0x0 0x0\n" * 12),
    ):
        (directory / name).write_text(content)
    (directory / "resource0").write_bytes(bytes([UNTOUCHED]) * PAGESIZE)
    memory = bytearray(crb.MEMORY_BYTES)
    attach = crb.Attach(crb.ATTACH_MAGIC, crb.LAYOUT_VERSION, 0, b"v" * 16, b"b" * 16, b"s" * 32)
    crb.ATTACH.pack_into(memory, crb.ATTACH_OFFSET, *attach)
    (directory / "resource2").write_bytes(memory)
    return directory


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Path]:
    """A machine with other devices, and one that shares memory for something else."""
    devices = tmp_path / "devices"
    make_device(devices, "0000:00:01.0", vendor=0x8086, device=0x29C0)
    other = make_device(devices, "0000:00:02.0")
    (other / "resource2").write_bytes(bytes(crb.MEMORY_BYTES))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names alone
    yield devices
    assert len(os.listdir("/proc/self/fd")) == before, "nothing is left open"  # noqa: PTH208


def test_the_interface_is_found_and_enabled_and_rung_by_one_write(devices: Path) -> None:
    device = make_device(devices, "0000:00:03.0")
    with PciInterface.find(devices) as interface:
        assert (device / "enable").read_text() == "1"
        driver = CrbDriver(interface, bytes(32))
        with pytest.raises(InterfaceError, match="did not answer within"):
            driver.transmit(b"command", timeout_s=0.01)
        del driver
    page = (device / "resource0").read_bytes()
    assert {at for at, byte in enumerate(page) if byte != UNTOUCHED} == set(range(DOORBELL, DOORBELL + 4))
    assert int.from_bytes(page[DOORBELL : DOORBELL + 4], "little") == SP_PEER << 16
    memory = (device / "resource2").read_bytes()
    assert crb.U32.unpack_from(memory, Register.CTRL_START) == (crb.START,)
    assert b"command" not in memory


def test_a_machine_without_one_is_told_so(tmp_path: Path) -> None:
    make_device(tmp_path, "0000:00:01.0", vendor=0x8086)
    with pytest.raises(InterfaceError, match="no PCI device 1af4:1110"):
        PciInterface.find(tmp_path)


def test_two_interfaces_are_one_too_many(devices: Path) -> None:
    for address in ("0000:00:03.0", "0000:00:04.0"):
        make_device(devices, address)
    with pytest.raises(InterfaceError, match="2 PCI devices"):
        PciInterface.find(devices)


def _is_small(device: Path) -> None:
    (device / "resource2").write_bytes(bytes(crb.MEMORY_BYTES // 2))


def _has_no_memory(device: Path) -> None:
    (device / "resource2").unlink()


def _has_no_registers(device: Path) -> None:
    (device / "resource0").unlink()


def _says_nonsense(device: Path) -> None:
    (device / "resource").write_text("nonsense\n")


@pytest.mark.parametrize("spoil", [_is_small, _has_no_memory, _has_no_registers, _says_nonsense])
def test_a_device_that_is_no_interface_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(make_device(tmp_path, "0000:00:01.0"))
    with pytest.raises(InterfaceError, match=r"0000:00:01\.0"):
        PciInterface.find(tmp_path)
