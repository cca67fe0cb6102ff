"""The VM security block: every state and every command against one table; what is stored comes back, what is damaged does not."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.wire.errors import AlreadyExists, IntegrityError, SpvtpmError, WrongState

VM = uuid.UUID("11111111-1111-4111-8111-111111111111")
VTPM = uuid.UUID("22222222-2222-4222-8222-222222222222")
OTHER_VTPM = uuid.UUID("33333333-3333-4333-8333-333333333333")

RUNNING, STOPPED, FAILED = VmState.RUNNING, VmState.STOPPED, VmState.FAILED

COMMANDS: dict[str, Callable[[VmSecurityBlock], VmSecurityBlock]] = {
    "start": VmSecurityBlock.start,
    "stop": VmSecurityBlock.stop,
    "fail": VmSecurityBlock.fail,
    "bind": lambda block: block.bind(OTHER_VTPM),
    "unbind": VmSecurityBlock.unbind,
}

OUTCOMES: dict[tuple[VmState, bool, str], VmState | type[SpvtpmError]] = {
    # state, has a vTPM, command: the new state, or why not
    (RUNNING, False, "start"): WrongState,
    (RUNNING, False, "stop"): STOPPED,
    (RUNNING, False, "fail"): FAILED,
    (RUNNING, False, "bind"): RUNNING,
    (RUNNING, False, "unbind"): WrongState,
    (RUNNING, True, "start"): WrongState,
    (RUNNING, True, "stop"): STOPPED,
    (RUNNING, True, "fail"): FAILED,
    (RUNNING, True, "bind"): AlreadyExists,
    (RUNNING, True, "unbind"): RUNNING,
    (STOPPED, False, "start"): RUNNING,
    (STOPPED, False, "stop"): WrongState,
    (STOPPED, False, "fail"): WrongState,
    (STOPPED, False, "bind"): WrongState,
    (STOPPED, False, "unbind"): WrongState,
    (STOPPED, True, "start"): RUNNING,
    (STOPPED, True, "stop"): WrongState,
    (STOPPED, True, "fail"): WrongState,
    (STOPPED, True, "bind"): AlreadyExists,
    (STOPPED, True, "unbind"): STOPPED,
    (FAILED, False, "start"): WrongState,
    (FAILED, False, "stop"): STOPPED,
    (FAILED, False, "fail"): WrongState,
    (FAILED, False, "bind"): WrongState,
    (FAILED, False, "unbind"): WrongState,
    (FAILED, True, "start"): WrongState,
    (FAILED, True, "stop"): STOPPED,
    (FAILED, True, "fail"): WrongState,
    (FAILED, True, "bind"): AlreadyExists,
    (FAILED, True, "unbind"): FAILED,
}


def block_in(state: VmState, *, bound: bool) -> VmSecurityBlock:
    block = VmSecurityBlock.launch(VM)
    if bound:
        block = block.bind(VTPM)
    return {RUNNING: lambda: block, STOPPED: block.stop, FAILED: block.fail}[state]()


def test_the_table_knows_every_state_and_every_command() -> None:
    assert set(OUTCOMES) == set(product(VmState, (False, True), COMMANDS))


@pytest.mark.claim("C2")
@pytest.mark.parametrize(("state", "bound", "command"), OUTCOMES, ids=str)
def test_each_command_does_in_each_state_what_the_table_says(state: VmState, bound: bool, command: str) -> None:
    block = block_in(state, bound=bound)
    before = msgspec.structs.asdict(block)
    outcome = OUTCOMES[state, bound, command]

    if isinstance(outcome, VmState):
        assert COMMANDS[command](block).state is outcome
    else:
        with pytest.raises(outcome, match=str(VM)):
            COMMANDS[command](block)
    assert msgspec.structs.asdict(block) == before, "a transition makes a new block"


def test_a_new_block_runs_its_first_boot_without_a_vtpm() -> None:
    block = VmSecurityBlock.launch(VM)
    assert (block.vm_id, block.state, block.boots, block.vtpm_id) == (VM, RUNNING, 1, None)
    assert block.boot_id is not None
    assert len(block.boot_id) == 16


@pytest.mark.attack("A13")
def test_a_start_is_a_new_boot_and_a_stop_ends_it() -> None:
    first = block_in(RUNNING, bound=True)
    stopped = first.stop()
    second = stopped.start()
    assert stopped.boot_id is None
    assert second.boot_id != first.boot_id
    assert (first.boots, stopped.boots, second.boots) == (1, 1, 2)


def test_a_failed_vm_has_the_boot_that_failed_until_it_is_stopped() -> None:
    running = block_in(RUNNING, bound=True)
    assert running.fail().boot_id == running.boot_id
    assert running.fail().stop().boot_id is None


@pytest.mark.claim("C2")
@pytest.mark.attack("A10")
@given(st.lists(st.sampled_from(sorted(COMMANDS)), max_size=40))
def test_no_sequence_of_commands_changes_the_binding_but_unbind_or_repeats_a_boot(commands: list[str]) -> None:
    block = VmSecurityBlock.launch(VM)
    boots = [block.boot_id]
    for command in commands:
        try:
            after = COMMANDS[command](block)
        except SpvtpmError:
            continue
        assert after.vm_id == VM
        if command == "bind":
            assert (block.vtpm_id, after.vtpm_id) == (None, OTHER_VTPM)
        else:
            assert after.vtpm_id == (None if command == "unbind" else block.vtpm_id)
        assert (after.state is STOPPED) == (after.boot_id is None)
        if command == "start":
            boots.append(after.boot_id)
        block = after
    assert block.boots == len(boots) == len(set(boots))


# What is stored


blocks = st.builds(
    VmSecurityBlock,
    vm_id=st.uuids(),
    state=st.sampled_from(VmState),
    boot_id=st.none() | st.binary(min_size=16, max_size=16),
    boots=st.integers(0, (1 << 63) - 1),
    vtpm_id=st.none() | st.uuids(),
)


@given(blocks)
def test_what_was_stored_comes_back_stopped(block: VmSecurityBlock) -> None:
    loaded = VmSecurityBlock.from_record(block.vm_id, block.to_record())
    assert loaded == VmSecurityBlock(block.vm_id, STOPPED, None, block.boots, block.vtpm_id)


@given(blocks.filter(lambda block: block.boot_id is not None))
def test_the_boot_id_is_never_stored(block: VmSecurityBlock) -> None:
    assert block.boot_id is not None
    assert block.boot_id not in block.to_record()


@pytest.mark.attack("A10")
@given(blocks, st.uuids())
def test_a_record_is_good_for_its_own_vm_only(block: VmSecurityBlock, other: uuid.UUID) -> None:
    if other != block.vm_id:
        with pytest.raises(IntegrityError, match=str(other)):
            VmSecurityBlock.from_record(other, block.to_record())


@given(blocks, st.data())
def test_a_record_that_is_cut_off_or_longer_is_damaged(block: VmSecurityBlock, data: st.DataObject) -> None:
    record = block.to_record()
    damaged = record[: data.draw(st.integers(0, len(record) - 1))]
    for bad in (damaged, record + b"\0"):
        with pytest.raises(IntegrityError, match="is damaged"):
            VmSecurityBlock.from_record(block.vm_id, bad)


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=40) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(anything)
def test_something_else_than_a_record_is_damaged(content: object) -> None:
    with pytest.raises(IntegrityError, match="is damaged"):
        VmSecurityBlock.from_record(VM, msgspec.msgpack.encode(content))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": 0},
        {"boots": -1},
        {"boots": 1 << 63},
        {"boots": "1"},
        {"vtpm_id": "not a uuid"},
        {"vm_id": None},
        {"owner": "somebody"},
    ],
    ids=str,
)
def test_a_record_with_one_field_out_of_bounds_is_damaged(change: dict[str, object]) -> None:
    fields = msgspec.msgpack.decode(block_in(RUNNING, bound=True).to_record())
    with pytest.raises(IntegrityError, match="is damaged"):
        VmSecurityBlock.from_record(VM, msgspec.msgpack.encode(fields | change))


def test_a_record_that_lacks_a_field_is_damaged() -> None:
    fields = msgspec.msgpack.decode(block_in(RUNNING, bound=True).to_record())
    for name in fields:
        less = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(IntegrityError, match="is damaged"):
            VmSecurityBlock.from_record(VM, msgspec.msgpack.encode(less))
