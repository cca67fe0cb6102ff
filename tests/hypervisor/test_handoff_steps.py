"""Steps of a VM that moves between hosts: from wherever it is found, to what was ordered or to a sentence, and never twice."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import replace
from typing import get_args

import msgspec
import pytest

from spvtpm.hypervisor.records import Brought, HandoffRecord
from spvtpm.hypervisor.steps import Sight, Step, Way, next_step
from spvtpm.wire.agent_api import WantedState
from spvtpm.wire.errors import NotFound, SpvtpmError, WrongState
from spvtpm.wire.messages import VmInfo
from tests.hypervisor.test_steps import after, block_of, is_as_ordered

VM = uuid.UUID(int=7)
THIS, OTHER = "1" * 32, "2" * 32
TOKEN = "a" * 64
MOST_STEPS = 10


def _block(state: str) -> VmInfo | None:
    return block_of(state, 3)


SIGHTS = [
    Sight(
        vm_id=VM,
        want=want,
        resuming=resuming,
        block=_block(state),
        admitted=True,
        begun=0,
        machine=machine,  # type: ignore[arg-type]
        machine_boots=3,
        image=image,
        kept=True,
        brought=brought,
        handoff=handoff,
        way=way,
    )
    for want, (resuming, image), state, machine, brought, handoff, way in itertools.product(
        get_args(WantedState),
        ((False, False), (False, True), (True, True)),
        ("none", "running", "leaving", "arriving", "stopped"),
        ("none", "running", "halted"),
        (
            None,
            Brought(handoff=THIS),
            Brought(handoff=THIS, token=TOKEN),
            Brought(handoff=OTHER, token=TOKEN),
        ),
        (
            None,
            HandoffRecord(handoff=THIS, side="source"),
            HandoffRecord(handoff=THIS, side="source", outcome="kept"),
            HandoffRecord(handoff=THIS, side="source", outcome="gone"),
            HandoffRecord(handoff=THIS, side="destination"),
            HandoffRecord(handoff=THIS, side="destination", outcome="come"),
        ),
        get_args(Way),
    )
]


def _after(sight: Sight, step: Step) -> Sight:
    """What a step does, if it succeeds; or how the secure processor refuses it."""
    state = sight.block.state if sight.block is not None else "none"
    handoff, brought = sight.handoff, sight.brought
    match step:
        case Step.SEND_START:
            return replace(sight, handoff=HandoffRecord(handoff=OTHER, side="source"), way="waiting")
        case Step.MOVE:
            assert handoff is not None
            gone = msgspec.structs.replace(handoff, outcome="gone")
            return replace(sight, block=None, machine="halted", handoff=gone, way="none")
        case Step.SETTLE:
            assert handoff is not None
            kept = msgspec.structs.replace(handoff, outcome="kept")
            return replace(sight, block=_block("running" if state == "leaving" else state), handoff=kept, way="none")
        case Step.RECEIVE_START:
            assert brought is not None
            if state != "none":
                raise WrongState("it is here")
            return replace(
                sight, handoff=HandoffRecord(handoff=brought.handoff, side="destination"), kept=True, way="waiting"
            )
        case Step.KEEP_MEMORY:
            return replace(sight, resuming=True, image=True, way="none")
        case Step.RECEIVE_FINISH:
            assert brought is not None
            if state not in ("arriving", "running"):
                raise NotFound("nothing has come")
            come = HandoffRecord(handoff=brought.handoff, side="destination", outcome="come")
            return replace(sight, block=_block("running"), handoff=come)
        case Step.RECEIVE_CANCEL:
            is_another = sight.want == "arriving" and brought is not None and brought.handoff != THIS
            if state == "arriving" and (brought is None or brought.token is None or is_another):
                raise WrongState("it has come")
            left = None if state == "arriving" else sight.block
            return replace(sight, block=left, handoff=None, brought=brought if is_another else None, way="none")
        case Step.FORGET_HANDOFF:
            return replace(sight, handoff=None, brought=None)
        case _:
            return after(sight, step)


def _path(sight: Sight) -> tuple[list[tuple[Sight, Step]], Sight]:
    """Steps until there is nothing to do, and what is then."""
    steps: list[tuple[Sight, Step]] = []
    while (step := next_step(sight)) is not Step.NOTHING:
        steps.append((sight, step))
        assert len(steps) <= MOST_STEPS, (steps[0], [step.name for _sight, step in steps])
        sight = _after(sight, step)
    return steps, sight


def _is_as_ordered(sight: Sight) -> bool:
    state = sight.block.state if sight.block is not None else None
    outcome = (sight.handoff.side, sight.handoff.outcome) if sight.handoff is not None else None
    match sight.want:
        case "departing":
            if outcome == ("source", "open"):
                return sight.way in ("waiting", "ended")
            return outcome == ("source", "gone" if not sight.has_machine else "kept")
        case "arriving":
            return (
                sight.way in ("waiting", "linked") or state is not None or sight.brought is None or outcome is not None
            )
        case _:
            return is_as_ordered(sight)


@pytest.mark.claim("C8")
def test_wherever_a_vm_that_moves_is_found_it_becomes_as_ordered_or_there_is_a_sentence() -> None:
    ends = 0
    for sight in SIGHTS:
        try:
            _steps, end = _path(sight)
        except SpvtpmError as error:
            assert str(error)
        else:
            assert _is_as_ordered(end), (sight, end)
            ends += 1
    assert ends > len(SIGHTS) // 3


@pytest.mark.attack("A18")
def test_a_machine_ends_only_when_its_handoff_is_decided() -> None:
    """Halted, it still has all of the VM's memory: it may have to go on."""
    for sight in SIGHTS:
        try:
            steps, _end = _path(sight)
        except SpvtpmError:
            continue
        for found, step in steps:
            if found.handoff is not None and (found.handoff.side, found.handoff.outcome) == ("source", "open"):
                assert step not in (Step.POWER_OFF, Step.END_MACHINE, Step.REMOVE, Step.STOP), (sight, step)


@pytest.mark.attack("A18")
def test_a_host_that_has_forgotten_what_it_expected_throws_it_away_on_the_word_of_its_source() -> None:
    sight = replace(
        SIGHTS[0], want="absent", block=_block("arriving"), brought=Brought(handoff=THIS, token=TOKEN), handoff=None
    )
    assert next_step(sight) is Step.RECEIVE_CANCEL
    assert next_step(replace(sight, block=None)) is Step.FORGET_HANDOFF


def test_no_machine_runs_at_the_destination_before_the_source_has_given_the_vtpm_up() -> None:
    for sight in SIGHTS:
        if sight.has_machine or sight.block is None or sight.block.state != "arriving":
            continue
        try:
            steps, _end = _path(sight)
        except SpvtpmError:
            continue
        done = [step for _found, step in steps]
        if Step.BEGIN_MACHINE in done:
            assert sight.brought is not None and sight.brought.token is not None
            assert done.index(Step.RECEIVE_FINISH) < done.index(Step.BEGIN_MACHINE)
