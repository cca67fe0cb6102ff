"""A handoff that breaks off anywhere is brought to its end by retries alone: one of the two has the vTPM, and one only."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress

import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.owner_messages import DestroyVm, Done
from tests.harness import RunningSp
from tests.processor.migration.pasts import furnished, is_nowhere, nv_of
from tests.processor.migration.two_chips import Cut, Handoff, Hook, Side, TwoChips, honest

pytestmark = [pytest.mark.claim("B9"), pytest.mark.attack("A18")]


def settle(handoff: Handoff) -> bool:
    """Whoever carries asks, and tells, again and again; whether the vTPM has moved."""
    try:
        token = handoff.finish()
    except SpvtpmError:
        for _ in range(2):  # once more changes nothing
            handoff.discard(handoff.cancel())
        return False
    assert handoff.finish() == token
    for _ in range(2):
        receipt = handoff.receive(token)
    for _ in range(2):
        handoff.forget(receipt)
    return True


def destroy(chips: TwoChips, sp: RunningSp, vm_id: uuid.UUID) -> None:
    """Its owner destroys it."""
    with sp.channel(chips.a.owner) as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)


def boot(sp: RunningSp, vm_id: uuid.UUID) -> None:
    """The VM runs, wherever it was left."""
    state = sp.vm(vm_id).state
    if state == "failed":
        sp.info(messages.StopVm(vm_id=vm_id))
    if state != "running":
        sp.info(messages.StartVm(vm_id=vm_id))


def verify(chips: TwoChips, vm_id: uuid.UUID, *, moved: bool) -> None:
    """One of the two has the vTPM, with all that was durable, and the other knows nothing of it."""
    home, other = (chips.b, chips.a) if moved else (chips.a, chips.b)
    assert is_nowhere(other, vm_id)
    boot(home, vm_id)
    with home.driver(vm_id) as driver:
        assert nv_of(driver) == b"in truth"
    destroy(chips, home, vm_id)


def go(handoff: Handoff, upto: int) -> None:
    """The first steps of a handoff."""
    steps: list[Callable[[], object]] = [
        lambda: handoff.send_memory(b"memory"),
        lambda: setattr(handoff, "nonce", handoff.stop()),
        lambda: handoff.send_final(handoff.nonce),
        handoff.finish,
        lambda: handoff.receive(handoff.finish()),
    ]
    for step in steps[:upto]:
        step()


STEPS = ["nothing", "memory", "stopped", "all sent", "given up", "received"]


@pytest.mark.attack("A16")
@pytest.mark.parametrize("who", ["source", "destination", "both"])
@pytest.mark.parametrize("upto", range(6), ids=STEPS)
def test_whoever_is_killed_at_whatever_step(chips: TwoChips, who: str, upto: int) -> None:
    vm_id, _seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    go(handoff, upto)
    victims = {"source": [chips.a], "destination": [chips.b], "both": [chips.a, chips.b]}[who]
    for victim in victims:
        victim.kill()
    for victim in victims:
        victim.start()
    moved = settle(handoff)
    handoff.close()
    assert moved == (upto >= 4)
    verify(chips, vm_id, moved=moved)


def cutting(side: Side, at: int) -> Hook:
    """The link is cut ahead of a side's n-th frame."""

    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        if (sender, number) == (side, at):
            raise Cut
        return [frame]

    return hook


def altering(side: Side, at: int) -> Hook:
    """A side's n-th frame has another bit."""
    return lambda sender, number, frame: (
        [frame[:-1] + bytes([frame[-1] ^ 1])] if (sender, number) == (side, at) else [frame]
    )


def doubling(side: Side, at: int) -> Hook:
    """A side's n-th frame comes twice."""
    return lambda sender, number, frame: [frame, frame] if (sender, number) == (side, at) else [frame]


def losing(side: Side, at: int) -> Hook:
    """A side's n-th frame does not come."""
    return lambda sender, number, frame: [] if (sender, number) == (side, at) else [frame]


def swapping(side: Side, at: int) -> Hook:
    """A side's n-th frame comes behind the next one."""
    held: list[bytes] = []

    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        if (sender, number) == (side, at):
            held.append(frame)
            return []
        if (sender, number) == (side, at + 1):
            return [frame, *held]
        return [frame]

    return hook


FAULTS = {"cut": cutting, "altered": altering, "doubled": doubling, "lost": losing, "swapped": swapping}


def _frames(chips: TwoChips) -> dict[Side, int]:
    """How many frames each side sends in a handoff that goes well."""
    vm_id, _seen = furnished(chips.a)
    handoff = chips.begin(vm_id, honest)
    go(handoff, 5)
    handoff.forget(handoff.receive(handoff.finish()))
    handoff.close()
    destroy(chips, chips.b, vm_id)
    sent = [side for side, _frame in handoff.carrier.seen]
    return {"source": sent.count("source"), "destination": sent.count("destination")}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_whatever_frame_of_the_link_is_cut_altered_doubled_lost_or_swapped(
    chips: TwoChips, side: Side, fault: str
) -> None:
    count = _frames(chips)[side]
    outcomes = set()
    for at in range(count):
        vm_id, _seen = furnished(chips.a)
        handoff = chips.begin(vm_id, FAULTS[fault](side, at))
        if fault in ("lost", "swapped"):
            handoff.carrier.cut_when_quiet()
        with suppress(SpvtpmError, OSError):
            go(handoff, 5)
        moved = settle(handoff)
        handoff.close()
        verify(chips, vm_id, moved=moved)
        outcomes.add(moved)
    assert False in outcomes
