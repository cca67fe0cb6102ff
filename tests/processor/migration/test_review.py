"""What a hypervisor, a carrier or an owner could do to a handoff between its steps, and what comes of it."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from spvtpm.processor.migration.manager import MAX_HANDOFFS
from spvtpm.wire import messages
from spvtpm.wire.errors import ChannelError, NotFound, WrongState, WrongToken
from spvtpm.wire.migration import Link
from spvtpm.wire.owner_messages import DestroyVm, Done
from tests.harness import RunningSp
from tests.processor.migration.pasts import furnished, is_nowhere, runs
from tests.processor.migration.two_chips import Frames, Handoff, Side, TwoChips, ask, connect, honest

pytestmark = [pytest.mark.claim("B9"), pytest.mark.attack("A18")]


@pytest.fixture(scope="module")
def chips() -> Iterator[TwoChips]:
    with TwoChips() as it:
        yield it


def until(happened: Callable[[], bool]) -> None:
    """Asks again and again."""
    while not happened():
        pass


def arrive(chips: TwoChips, vm_id: uuid.UUID, *, holding: threading.Event | None = None) -> Handoff:
    """A handoff up to where its destination is prepared.

    Args:
        chips: from the first to the second.
        vm_id: the VM.
        holding: what the source says behind the vTPM waits for this.
    """

    def hook(side: Side, _number: int, frame: bytes) -> list[bytes]:
        if holding is not None and side == "source" and chips.b.vms() and chips.b.vm(vm_id).state == "arriving":
            holding.wait(30)
        return [frame]

    handoff = chips.begin(vm_id, hook)
    handoff.send_memory(b"memory")
    handoff.send_final(handoff.stop())
    until(lambda: not is_nowhere(chips.b, vm_id))
    return handoff


def residency(sp: RunningSp, vm_id: uuid.UUID) -> str:
    """Where its vTPM lives."""
    vtpm = sp.vm(vm_id).vtpm
    return "" if vtpm is None else vtpm.residency


def mapped_by(pid: int) -> bytes:
    """What a process has mapped; nothing if it is no more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/maps").read_bytes()
    return b""


def test_a_vtpm_that_is_parked_before_the_commit_token_comes_runs_then(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    chips.b.info(messages.ParkVtpm(vm_id=vm_id))
    handoff.forget(handoff.receive(handoff.finish()))
    runs(chips.b, vm_id, seen)
    handoff.close()


def test_a_vtpm_whose_process_dies_before_the_commit_token_comes_is_resumed(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    for pid in chips.b.workers():
        if b"spvtpm-crb" in mapped_by(pid):
            os.kill(pid, signal.SIGKILL)
    until(lambda: residency(chips.b, vm_id) == "failed")
    handoff.forget(handoff.receive(handoff.finish()))
    chips.b.info(messages.StartVm(vm_id=vm_id))
    runs(chips.b, vm_id, seen)
    handoff.close()


def test_a_second_link_does_not_part_the_destination_from_the_first(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.send_memory(b"memory")
    until(lambda: bool(handoff.came))
    with connect(chips.b, Link(handoff.id)) as second:
        assert Frames(second).receive()  # a refusal
        assert Frames(second).receive() is None
    handoff.send_final(handoff.stop())
    handoff.forget(handoff.receive(handoff.finish()))
    runs(chips.b, vm_id, seen)
    handoff.close()


@pytest.mark.attack("A23")
def test_an_owner_who_destroys_what_arrives_takes_no_place_from_others(chips: TwoChips) -> None:
    vm_id, _seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    with chips.b.channel(chips.a.owner) as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)
    token = handoff.finish()
    with pytest.raises(NotFound):
        handoff.receive(token)
    handoff.close()
    begun = [
        messages.ReceiveStart(vm_id=uuid.uuid4(), handoff=number.to_bytes(16, "big")) for number in range(MAX_HANDOFFS)
    ]
    for request in begun:
        ask(chips.b, request, messages.Handoff)
    for request in begun:
        ask(chips.b, messages.ReceiveCancel(vm_id=request.vm_id, handoff=request.handoff), messages.Handoff)


def test_what_is_asked_for_while_the_vtpm_is_being_stopped_leaves_nothing_in_doubt(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.send_memory(b"memory")
    until(lambda: bool(handoff.came))
    handoff.carrier.cut_when_quiet()
    stopping = threading.Thread(target=handoff.stop)
    stopping.start()
    with pytest.raises((WrongState, ChannelError)):
        handoff.finish()
    stopping.join()
    handoff.discard(handoff.cancel())
    runs(chips.a, vm_id, seen)
    handoff.close()


def test_a_handoff_that_came_to_nothing_can_be_ended_when_the_vtpm_is_gone_otherwise(chips: TwoChips) -> None:
    vm_id, _seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    handoff.carrier.cut()
    until(lambda: chips.a.vm(vm_id).state == "running")
    with chips.a.channel() as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)
    handoff.discard(handoff.cancel())
    assert is_nowhere(chips.b, vm_id)
    handoff.close()


def test_of_two_destinations_the_one_that_did_not_get_it_can_be_told_so_at_last(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    left = arrive(chips, vm_id)
    left.carrier.cut()
    until(lambda: chips.a.vm(vm_id).state == "running")
    with RunningSp(chips.a.state.with_name("c"), vendor=chips.vendor) as third:
        other = Handoff(chips.a, third, vm_id, honest, chips.revoked)
        other.move()
        runs(third, vm_id, seen)
        left.discard(left.cancel())
        assert is_nowhere(chips.b, vm_id)
        with pytest.raises(WrongState):
            other.cancel()
        other.close()
    left.close()


def test_a_vtpm_that_was_given_up_is_never_said_to_have_stayed(chips: TwoChips) -> None:
    vm_id, _seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.move()
    receipt = handoff.receive(handoff.finish())
    handoff.close()
    there_and_back = chips.begin(vm_id, source=chips.b)
    there_and_back.move()
    there_and_back.close()
    for _ in range(2):
        with pytest.raises(WrongState):
            handoff.cancel()
        handoff.forget(receipt)


def test_an_abort_token_is_told_to_nobody_who_names_another_vm(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    other = ask(chips.a, messages.SendCancel(vm_id=uuid.uuid4(), handoff=handoff.id), messages.HandoffToken)
    with pytest.raises(WrongToken):
        handoff.discard(other.token)
    handoff.receive(handoff.finish())
    runs(chips.b, vm_id, seen)
    handoff.close()
