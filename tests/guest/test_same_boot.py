"""A guest goes on with the TPM that was on all the time while it ran, and with no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spvtpm.guest.same_boot import verify_same_boot
from spvtpm.wire import messages
from spvtpm.wire.errors import InterfaceError, StorageError
from tests import tpm_commands as tpm
from tests.harness import RunningSp

ANEW = "powered on anew while this system ran"


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "run" / "starts"


def test_the_first_look_starts_the_tpm_and_later_ones_find_it_on(sp: RunningSp, record: Path) -> None:
    vm_id = sp.launch()
    for _ in range(2):
        with sp.driver(vm_id) as driver:
            verify_same_boot(driver.transmit, record)
            tpm.checked(driver.transmit(tpm.pcr_extend(16, bytes(32))))


def test_a_tpm_that_was_started_before_is_taken_as_it_is(sp: RunningSp, record: Path) -> None:
    with sp.driver(sp.launch()) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        verify_same_boot(driver.transmit, record)


@pytest.mark.attack("A13")
def test_a_tpm_that_was_powered_on_anew_is_refused_started_or_not(sp: RunningSp, record: Path) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        verify_same_boot(driver.transmit, record)
    sp.info(messages.ResetVm(vm_id=vm_id))
    with sp.driver(vm_id) as driver:
        with pytest.raises(InterfaceError, match=ANEW):
            verify_same_boot(driver.transmit, record)
        assert tpm.response_code(driver.transmit(tpm.read_clock())) == tpm.RC_INITIALIZE, "it was left alone"
        tpm.checked(driver.transmit(tpm.startup()))
        with pytest.raises(InterfaceError, match=ANEW):
            verify_same_boot(driver.transmit, record)


@pytest.mark.attack("A30")
def test_a_tpm_that_goes_on_from_hibernation_is_the_same(sp: RunningSp, record: Path) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        verify_same_boot(driver.transmit, record)
    sp.info(messages.HibernateVm(vm_id=vm_id))
    sp.info(messages.StartVm(vm_id=vm_id))
    with sp.driver(vm_id) as driver:
        verify_same_boot(driver.transmit, record)


@pytest.mark.parametrize("answer", [b"", tpm.get_random(8), bytes.fromhex("80010000000a00000000")])
def test_a_tpm_that_does_not_tell_its_starts_is_refused(record: Path, answer: bytes) -> None:
    def transmit(command: bytes) -> bytes:
        return bytes.fromhex("80010000000a00000000") if command == tpm.startup() else answer

    with pytest.raises(InterfaceError, match="does not tell"):
        verify_same_boot(transmit, record)
    assert not record.exists()


def _directory(record: Path) -> None:
    record.mkdir(parents=True)


def _others_can_read_it(record: Path) -> None:
    record.parent.mkdir()
    record.write_bytes(bytes(8))
    record.chmod(0o644)


@pytest.mark.parametrize("spoil", [_directory, _others_can_read_it])
def test_a_note_that_cannot_be_relied_on_is_refused(sp: RunningSp, record: Path, spoil: Callable[[Path], None]) -> None:
    spoil(record)
    with sp.driver(sp.launch()) as driver, pytest.raises(StorageError):
        verify_same_boot(driver.transmit, record)
