"""Unmodified Linux guests in an unmodified QEMU, their vTPM attached through the TPM emulator interface."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.wire import messages
from tests import tpm_commands as tpm
from tests.guests.kernel import Initramfs, needs_guests
from tests.guests.machine import Guest
from tests.guests.qmp import Qmp
from tests.guests.tpm_device import SHELL, ask, response, said
from tests.harness import RunningSp
from tests.swtpm_process import RunningSwtpm

pytestmark = [needs_guests, pytest.mark.claim("B1")]

_INDEX = 0x1500001
_TOUCH = tpm.pcr_extend(16, b"m" * 32)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A place for sockets and initramfs."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def sp(directory: Path) -> Iterator[RunningSp]:
    """A running SP for all tests here."""
    with RunningSp(directory / "sp") as running:
        yield running


@pytest.fixture
def vm(sp: RunningSp) -> tuple[uuid.UUID, list[str]]:
    """A VM that its SP has booted on this interface, and QEMU's arguments for it."""
    vm_id, path = sp.launch_emulated()
    return vm_id, attached(path)


def attached(path: Path, model: str = "tpm-crb") -> list[str]:
    return [
        *("-chardev", f"socket,id=tpm-control,path={path}"),
        *("-tpmdev", "emulator,id=tpm,chardev=tpm-control", "-device", f"{model},tpmdev=tpm"),
    ]


@pytest.mark.parametrize("model", ["tpm-crb", "tpm-tis"])
def test_the_kernels_own_driver_finds_its_tpm_and_measures_into_it(sp: RunningSp, directory: Path, model: str) -> None:
    script = (
        "echo driver=$(readlink /sys/class/tpm/tpm0/device/driver | sed 's,.*/,,') \n"
        "echo version=$(cat /sys/class/tpm/tpm0/tpm_version_major) \n"
        "echo pcr10=$(cat /sys/class/tpm/tpm0/pcr-sha256/10) \n"
        "head -n 1 /sys/kernel/security/integrity/ima/ascii_runtime_measurements\n"
    )
    initramfs = Initramfs(SHELL + script + ask("random", tpm.get_random(8)) + ask("pcr10_read", tpm.pcr_read(10)))
    _vm_id, path = sp.launch_emulated()
    with Guest(initramfs.write(directory / "initramfs"), attached(path, model)) as guest:
        said_all = guest.wait()
        assert f"driver={'tpm_crb' if model == 'tpm-crb' else 'tpm_tis'}" in said_all
        assert "version=2" in said_all
        assert "boot_aggregate" in said_all
        assert len(tpm.random_in(response(guest.wait_for(said("random"))))) == 8
        pcr = tpm.pcr_in(response(guest.wait_for(said("pcr10_read"))))
        assert pcr != bytes(32)
        assert f"pcr10={pcr.hex().upper()}" in said_all


def test_a_reboot_resets_pcrs_and_keeps_what_is_permanent(vm: tuple[uuid.UUID, list[str]], directory: Path) -> None:
    first = (
        ask("define", tpm.nv_define(_INDEX, 4))
        + ask("write", tpm.nv_write(_INDEX, b"kept"))
        + ask("touch", _TOUCH)
        + ask("touched", tpm.pcr_read(16))
        + ask("clock_before", tpm.read_clock())
    )
    look = ask("content", tpm.nv_read(_INDEX, 4)) + ask("pcr", tpm.pcr_read(16)) + ask("clock", tpm.read_clock())
    script = f"{SHELL}case $({look.splitlines()[0]}) in *=8001*) {first} reboot -f;; esac\n{look}"
    with Guest(Initramfs(script).write(directory / "initramfs"), vm[1], reboots=True) as guest:
        assert tpm.pcr_in(response(guest.wait_for(said("touched")))) != bytes(32)
        guest.wait()
        assert tpm.nv_content_in(response(guest.wait_for(said("content")))) == b"kept"
        assert tpm.pcr_in(response(guest.wait_for(said("pcr")))) == bytes(32)
        before, after = (tpm.clock_in(response(guest.wait_for(said(name)))) for name in ("clock_before", "clock"))
        assert after.reset_count == before.reset_count + 1
        assert after.is_safe, "the TPM was shut down in order"


def test_a_guest_notices_nothing_of_its_vtpm_being_parked(
    sp: RunningSp, vm: tuple[uuid.UUID, list[str]], directory: Path
) -> None:
    script = ask("touch", _TOUCH) + ask("before", tpm.pcr_read(16)) + "read go\n" + ask("after", tpm.pcr_read(16))
    with Guest(Initramfs(SHELL + script).write(directory / "initramfs"), vm[1]) as guest:
        before = response(guest.wait_for(said("before")))
        parked = sp.info(messages.ParkVtpm(vm_id=vm[0])).vtpm
        assert parked is not None and parked.residency == "parked"
        guest.enter("go")
        assert tpm.pcr_in(response(guest.wait_for(said("after")))) == tpm.pcr_in(before) != bytes(32)


def test_a_guest_that_is_killed_in_mid_command_leaves_a_tpm_that_works(
    vm: tuple[uuid.UUID, list[str]], directory: Path
) -> None:
    key = tpm.create_primary(tpm.rsa2048(unique=b"k" * 256))
    script = SHELL + ask("touch", _TOUCH) + "echo busy\n" + "while true; do\n" + ask("key", key) + "done\n"
    with Guest(Initramfs(script).write(directory / "initramfs"), vm[1]) as guest:
        guest.wait_for("busy")
        guest.kill(signal.SIGKILL)
        guest.wait()
    look = SHELL + ask("pcr", tpm.pcr_read(16))
    with Guest(Initramfs(look).write(directory / "initramfs"), vm[1]) as guest:
        assert tpm.pcr_in(response(guest.wait_for(said("pcr")))) == bytes(32)


def test_qemu_itself_refuses_to_migrate_or_save_such_a_machine(
    vm: tuple[uuid.UUID, list[str]], directory: Path
) -> None:
    monitor = directory / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(monitor))
        listener.listen(1)
        listener.settimeout(60)
        initramfs = Initramfs("echo up; read go").write(directory / "initramfs")
        with Guest(initramfs, [*vm[1], "-qmp", f"unix:{monitor}"]) as guest, listener.accept()[0] as connection:
            guest.wait_for("up")
            with pytest.raises(AssertionError, match="TPM"):
                Qmp(connection).do("migrate", uri="exec:cat >/dev/null")


def test_by_swtpms_command_line(directory: Path) -> None:
    place = directory / "swtpm"
    place.mkdir()
    initramfs = Initramfs(SHELL + ask("random", tpm.get_random(8))).write(place / "initramfs")
    running = RunningSwtpm(place, (sys.executable, "-m", "spvtpm.swtpm"), ("--terminate",))
    with running as control, Guest(initramfs, attached(control)) as guest:
        assert len(tpm.random_in(response(guest.wait_for(said("random"))))) == 8
        guest.wait()
        assert running.process.wait(60) == 0, "it ends with its machine"
