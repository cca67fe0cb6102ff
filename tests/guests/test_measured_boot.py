"""Measured boot: OVMF and Debian's kernel under an unmodified QEMU measure into our vTPM, and what they log leads to its PCRs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from spvtpm.terminal.appraisal import DEFAULT_PCRS, appraise, parse_selection
from spvtpm.terminal.evidence import converse, gather
from spvtpm.wire.event_log import parse_event_log
from tests.attesting import ek_of
from tests.guests.kernel import BUSYBOX, FIRMWARE, FIRMWARE_VARIABLES, Initramfs, needs_firmware, needs_guests
from tests.guests.machine import Guest
from tests.guests.measurements import EVENTS, SAY, SCRIPT, TRANSMIT, Measured, transmit
from tests.harness import RunningSp

pytestmark = [needs_guests, needs_firmware, pytest.mark.claim("B1")]

APPEND = "measured=yes"


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place for sockets and images; its name is short."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        yield Path(path)


def _devices(directory: Path, interface: Path) -> list[str]:
    variables = shutil.copy(FIRMWARE_VARIABLES, directory / "variables")
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
        *("-chardev", f"socket,id=control,path={interface}"),
        *("-tpmdev", "emulator,id=tpm,chardev=control", "-device", "tpm-crb,tpmdev=tpm"),
    ]


def _assert_log_leads_to_pcrs(measured: Measured, directory: Path) -> None:
    replayed = measured.replayed(directory / "events")
    assert set(replayed) == {0, 1, 2, 3, 4, 5, 6, 7, 9}
    assert replayed == {number: measured.pcrs[number] for number in replayed}
    assert measured.pcrs[8] == bytes(32), "nobody measured into it"


def test_firmware_and_kernel_log_what_the_vtpms_pcrs_hold_and_do_it_anew_after_a_reboot(directory: Path) -> None:
    image = Initramfs(f"{SAY}{TRANSMIT}reboot -f").write(directory / "initramfs")
    with RunningSp(directory / "sp") as sp:
        vm_id, interface = sp.launch_emulated()
        with Guest(image, _devices(directory, interface), APPEND, reboots=True) as guest:
            guest.wait_for(EVENTS)
            first = Measured.of(guest.said)
            evidence = converse(
                gather(ek_of(sp, vm_id), parse_selection(DEFAULT_PCRS)), lambda command: transmit(guest, command)
            )
            guest.said = ""
            guest.enter("again")
            guest.wait_for(EVENTS)
            second = Measured.of(guest.said)

    _assert_log_leads_to_pcrs(first, directory)
    assert [evidence.pcrs["sha256"][number] for number in range(11)] == first.pcrs
    appraisal = appraise(evidence.pcrs, None, parse_event_log(first.events))
    assert appraisal.verdict == "genuine"
    assert {pcr.index for pcr in appraisal.pcrs if pcr.is_logged} == {*range(8), 9}

    explained = first.explained(directory / "events")
    assert sha256(image.read_bytes()).hexdigest() in explained, "the initramfs that was booted"
    command_line = f"console=ttyS0 quiet panic=-1 {APPEND} initrd=initrd\0"
    assert sha256(command_line.encode("utf-16-le")).hexdigest() in explained
    other = first.events.replace(sha256(image.read_bytes()).digest(), sha256(b"another").digest())
    assert first._replace(events=other).replayed(directory / "other")[9] != first.pcrs[9]

    # IMA goes on where the firmware has ended.
    for measured in (first, second):
        assert measured.replayed_ima() == measured.pcrs[10]
        programs = measured.programs()
        assert programs["boot_aggregate"] == sha256(b"".join(measured.pcrs[:10])).hexdigest()
        assert programs["/bin/busybox"] == sha256(BUSYBOX.read_bytes()).hexdigest()
        assert programs["/tmp/measured"] == sha256(SCRIPT).hexdigest()  # in the guest

    assert second.boot != first.boot
    _assert_log_leads_to_pcrs(second, directory)
    assert second.pcrs == first.pcrs
    assert len(second.events) == len(first.events)
