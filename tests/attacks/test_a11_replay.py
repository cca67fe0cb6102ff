"""A11: old requests written back, responses swapped, frames of another VM, boot or address spliced in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spvtpm.embedded import VTPM
from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import crb, messages
from spvtpm.wire.crb import AttachError, Register
from spvtpm.wire.errors import InterfaceError, MailboxError
from tests import tpm_commands as tpm
from tests.attacks import memory_owner
from tests.harness import RunningSp

MEASUREMENT = bytes(range(32))


class AttackedVm:
    """A VM whose memory the test owns, with one PCR extension already recorded by the attacker."""

    def __init__(self, sp: RunningSp) -> None:
        self.sp = sp
        self.vm_id = sp.launch()
        self.attach()
        tpm.checked(self.driver.transmit(tpm.startup()))
        tpm.checked(self.driver.transmit(tpm.pcr_extend(16, MEASUREMENT)))
        self.recorded = memory_owner.frame_at(self.interface, crb.COMMAND_ADDRESS)
        self.honest_pcr = self.pcr()

    def attach(self) -> None:
        self.interface = InterfaceMemory.connect(self.sp.interface(self.vm_id))
        self.driver = CrbDriver(self.interface, self.sp.key(self.vm_id))

    def pcr(self) -> bytes:
        return tpm.pcr_in(self.driver.transmit(tpm.pcr_read(16)))


@pytest.fixture
def vm(sp: RunningSp) -> Iterator[AttackedVm]:
    attacked = AttackedVm(sp)
    yield attacked
    attacked.interface.close()


@pytest.mark.attack("A11")
def test_a_plain_request_sent_twice_is_executed_twice(vtpm: VTPM) -> None:
    request = tpm.pcr_extend(16, MEASUREMENT)
    vtpm.transmit(request)
    once = tpm.pcr_in(vtpm.transmit(tpm.pcr_read(16)))
    vtpm.transmit(request)

    assert tpm.pcr_in(vtpm.transmit(tpm.pcr_read(16))) != once


@pytest.mark.attack("A11")
@pytest.mark.claim("B4")
def test_a_replayed_request_is_never_executed(vm: AttackedVm) -> None:
    assert memory_owner.replay(vm.interface, vm.recorded) is AttachError.REPLAYED
    assert vm.pcr() == vm.honest_pcr


@pytest.mark.attack("A11")
@pytest.mark.claim("B4")
def test_a_request_replayed_after_parking_and_waking_is_never_executed(vm: AttackedVm) -> None:
    vm.sp.info(messages.ParkVtpm(vm_id=vm.vm_id))

    assert memory_owner.replay(vm.interface, vm.recorded) is AttachError.REPLAYED
    assert vm.pcr() == vm.honest_pcr


@pytest.mark.attack("A11")
@pytest.mark.claim("B4")
def test_a_request_of_an_earlier_session_is_never_executed(vm: AttackedVm) -> None:
    vm.interface.close()
    vm.attach()
    assert vm.pcr() == vm.honest_pcr

    assert memory_owner.replay(vm.interface, vm.recorded) is AttachError.NOT_AUTHENTIC
    assert vm.pcr() == vm.honest_pcr


@pytest.mark.attack("A11")
@pytest.mark.claim("B4")
def test_a_request_of_an_earlier_boot_is_never_executed(vm: AttackedVm) -> None:
    vm.sp.info(messages.ResetVm(vm_id=vm.vm_id))
    vm.interface.close()
    vm.attach()
    tpm.checked(vm.driver.transmit(tpm.startup()))

    assert memory_owner.replay(vm.interface, vm.recorded) is AttachError.NOT_AUTHENTIC
    assert vm.pcr() == bytes(32)


@pytest.mark.attack("A11")
def test_a_guest_that_runs_on_over_a_reset_refuses_the_new_boot(vm: AttackedVm) -> None:
    vm.sp.info(messages.ResetVm(vm_id=vm.vm_id))
    memory_owner.write(vm.interface, Register.LOC_CTRL, 1)

    with pytest.raises(InterfaceError, match="powered on anew"):
        vm.driver.transmit(tpm.get_random(8))


@pytest.mark.attack("A11")
@pytest.mark.claim("B4")
def test_a_request_moved_to_another_address_is_never_executed(vm: AttackedVm) -> None:
    fresh = vm.driver._session.seal(1, vm.driver._sequence + 1, crb.COMMAND_ADDRESS, tpm.pcr_extend(16, MEASUREMENT))  # type: ignore[arg-type]

    assert memory_owner.replay(vm.interface, fresh, address=0x6000) is AttachError.NOT_AUTHENTIC
    assert vm.pcr() == vm.honest_pcr
    again = vm.driver._session.seal(1, vm.driver._sequence + 1, crb.COMMAND_ADDRESS, tpm.pcr_extend(16, MEASUREMENT))  # type: ignore[arg-type]
    assert memory_owner.replay(vm.interface, again) is AttachError.NONE, "the same frame in its place is executed"


@pytest.mark.attack("A11")
@pytest.mark.claim("B4")
def test_a_frame_of_another_vm_is_never_executed(vm: AttackedVm, sp: RunningSp) -> None:
    other = AttackedVm(sp)

    assert memory_owner.replay(vm.interface, other.recorded) is AttachError.NOT_AUTHENTIC
    assert vm.pcr() == vm.honest_pcr
    other.interface.close()


@pytest.mark.attack("A11")
@pytest.mark.claim("B4")
@pytest.mark.parametrize("offset", [0, 5, 8, 20, 30, 64, 70, 100])
def test_an_altered_request_is_never_executed(vm: AttackedVm, offset: int) -> None:
    frame = bytearray(
        vm.driver._session.seal(1, vm.driver._sequence + 1, crb.COMMAND_ADDRESS, tpm.pcr_extend(16, MEASUREMENT))  # type: ignore[arg-type]
    )
    frame[offset] ^= 1

    assert memory_owner.replay(vm.interface, bytes(frame)) in (AttachError.NOT_AUTHENTIC, AttachError.BAD_FRAME)
    assert vm.pcr() == vm.honest_pcr


@pytest.mark.attack("A11")
@pytest.mark.claim("B4")
def test_the_guest_refuses_the_response_of_another_command(vm: AttackedVm, monkeypatch: pytest.MonkeyPatch) -> None:
    old_response = memory_owner.frame_at(vm.interface, crb.RESPONSE_ADDRESS)
    wait = vm.interface.wait

    def swap_when_it_rings(timeout_s: float) -> bool:
        rang = wait(timeout_s)
        memory_owner.put(vm.interface, crb.RESPONSE_ADDRESS, old_response)
        return rang

    monkeypatch.setattr(vm.interface, "wait", swap_when_it_rings)
    with pytest.raises(MailboxError):
        vm.driver.transmit(
            tpm.create_primary(tpm.rsa2048())
        )  # runs so long that the driver sleeps, and waits for the ring
