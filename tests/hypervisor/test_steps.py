"""From wherever a VM is found, steps lead to what was ordered or to a sentence, and use a memory image once."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import replace
from typing import get_args

import pytest

from spvtpm.hypervisor.steps import Sight, Step, next_step
from spvtpm.hypervisor.virtual_machine import MachineState
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.messages import VmInfo

VM = uuid.UUID(int=7)
MOST_STEPS = 8


def block_of(state: str, boots: int) -> VmInfo | None:
    return None if state == "none" else VmInfo(VM, state, boots, None)  # type: ignore[arg-type]


SIGHTS = [
    Sight(
        vm_id=VM,
        want=want,  # type: ignore[arg-type]
        resuming=resuming,
        block=block_of(state, boots),
        admitted=False,
        begun=begun,
        machine=machine,
        machine_boots=machine_boots,
        image=image,
        kept=True,
    )
    for want, resuming, state, boots, begun, machine, machine_boots, image in itertools.product(
        ("defined", "running", "stopped", "hibernated", "absent"),
        (False, True),
        ("none", "running", "stopped", "hibernated", "failed", "damaged"),
        (0, 3),
        (0, 3),
        get_args(MachineState),
        (2, 3),
        (False, True),
    )
]


def after(sight: Sight, step: Step) -> Sight:
    """What a step does, if it succeeds."""
    boots = sight.block.boots if sight.block is not None else 0
    match step:
        case Step.ADMIT:
            return replace(sight, admitted=True)
        case Step.LAUNCH | Step.START | Step.RESET:
            return replace(sight, block=block_of("running", boots + 1), begun=boots + 1)
        case Step.STOP:
            return replace(sight, block=block_of("stopped", boots))
        case Step.HIBERNATE:
            return replace(sight, block=block_of("hibernated", boots))
        case Step.MARK_RESUMING:
            return replace(sight, resuming=True)
        case Step.BEGIN_MACHINE:
            return replace(sight, machine="running", machine_boots=boots, begun=0)
        case Step.AWAIT_MACHINE | Step.GO_ON:
            return replace(sight, machine="running")
        case Step.POWER_OFF | Step.END_MACHINE:
            return replace(sight, machine="none")
        case Step.SUSPEND:
            return replace(sight, machine="suspended", image=True)
        case Step.FORGET_IMAGE:
            return replace(sight, image=False, resuming=False)
        case Step.REMOVE:
            return replace(sight, image=False, kept=False)
        case _:
            raise AssertionError(step)


def _path(sight: Sight) -> tuple[list[Step], Sight]:
    """Steps until there is nothing to do, and what is then."""
    steps: list[Step] = []
    while (step := next_step(sight)) is not Step.NOTHING:
        steps.append(step)
        assert len(steps) <= MOST_STEPS, (sight, steps)
        sight = after(sight, step)
    return steps, sight


def is_as_ordered(sight: Sight) -> bool:
    """Whether it is, of a VM that does not move."""
    state = sight.block.state if sight.block is not None else None
    match sight.want:
        case "running":
            return sight.takes_part and sight.machine == "running" and not sight.image and not sight.resuming
        case "stopped":
            return not sight.has_machine and state in (None, "stopped")
        case "hibernated":
            return not sight.has_machine and state in (None, "hibernated")
        case "absent":
            return not sight.has_machine and state is None and not sight.kept
        case _:
            return sight.admitted or state is not None


def test_wherever_a_vm_is_found_it_becomes_as_ordered_or_there_is_a_sentence() -> None:
    ends = 0
    for sight in SIGHTS:
        try:
            _steps, end = _path(sight)
        except SpvtpmError as error:
            assert str(error)
        else:
            assert is_as_ordered(end), sight
            ends += 1
    assert ends > len(SIGHTS) // 2


def test_a_machine_takes_part_in_one_boot() -> None:
    """One that ran in an earlier boot ends before another begins."""
    for sight in SIGHTS:
        found = sight
        try:
            while (step := next_step(found)) is not Step.NOTHING:
                if step in (Step.LAUNCH, Step.START, Step.RESET, Step.BEGIN_MACHINE):
                    assert not found.has_machine, sight
                found = after(found, step)
        except SpvtpmError:
            continue


@pytest.mark.attack("A30")
def test_a_cold_boot_never_goes_on_from_an_image() -> None:
    """What was hibernated is good for one resumption: its memory goes with it."""
    for sight in SIGHTS:
        found, resumes = sight, sight.block is not None and sight.block.state == "hibernated"
        if sight.want != "running" or (sight.resuming and sight.image):
            continue
        try:
            while (step := next_step(found)) is not Step.NOTHING:
                if step is Step.BEGIN_MACHINE and found.resuming and found.image:
                    assert resumes, sight
                found = after(found, step)
        except SpvtpmError:
            continue


def test_a_hibernated_vm_is_never_stopped() -> None:
    """That would throw its state away."""
    for sight in SIGHTS:
        if sight.block is not None and sight.block.state == "hibernated":
            try:
                steps, _end = _path(sight)
            except SpvtpmError:
                continue
            assert Step.STOP not in steps and Step.RESET not in steps
