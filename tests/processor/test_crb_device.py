"""The CRB state machine, every state × every write, against the table of the PTP; and where frames may lie."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from spvtpm.processor.interfaces._direct import ffi, lib
from spvtpm.wire import crb
from spvtpm.wire.crb import AttachError, Register

IDLE, READY, EXECUTION, COMPLETION = lib.CRB_IDLE, lib.CRB_READY, lib.CRB_EXECUTION, lib.CRB_COMPLETION
STATES = (IDLE, READY, EXECUTION, COMPLETION)
REQUEST_ACCESS, RELINQUISH, CMD_READY, GO_IDLE, START, CANCEL = 1, 2, 1, 2, 1, 1
ERRORS = (AttachError.NONE, AttachError.BAD_FRAME)
VALUES = (0, 1, 2, 3, 4, 8, 16, 1 << 31, 0xFFFFFFFF)


class Model:
    """What the PTP says, as a table: what a write does in a state that takes it; every other write does nothing.

    Source: TCG PC Client PTP 1.05, section 6.5.3.8, "CRB state machine", with CapCRBIdleBypass; typed in from there.
    """

    def __init__(self, state: int, granted: bool, error: int) -> None:
        self.state, self.granted, self.error = state, granted, error

    def write(self, register: int, value: int) -> int:
        if self.state == EXECUTION:
            return int(lib.CRB_CANCEL if (register, value) == (Register.CTRL_CANCEL, CANCEL) else lib.CRB_NOTHING)
        match (register, value, self.granted):
            case (Register.LOC_CTRL, 1, _):
                self.granted = True
            case (Register.LOC_CTRL, 2, True):
                self.granted, self.state, self.error = False, IDLE, AttachError.NONE
            case (Register.CTRL_REQ, 1, True):
                self.state, self.error = READY, AttachError.NONE
            case (Register.CTRL_REQ, 2, True):
                self.state, self.error = IDLE, AttachError.NONE
            case (Register.CTRL_START, 1, True) if self.state == READY:
                self.state = EXECUTION
                return int(lib.CRB_EXECUTE)
        return int(lib.CRB_NOTHING)


def new_device(state: int, granted: bool, error: int) -> Any:
    return ffi.new("struct crb_device *", (state, granted, error))


@pytest.mark.claim("C9")
@pytest.mark.parametrize("state", STATES)
def test_every_write_in_every_state_does_what_the_ptp_says_and_nothing_else(state: int) -> None:
    writes = 0
    for granted, error, offset, value in product((False, True), ERRORS, range(0, 0x80, 4), VALUES):
        device, model = new_device(state, granted, error), Model(state, granted, error)
        effect = lib.crb_write(device, offset, value)

        assert effect == model.write(offset, value), (offset, value)
        assert (device.state, device.granted, device.error) == (model.state, model.granted, model.error)
        writes += 1
    assert writes == 2 * 2 * 32 * 9


@given(st.sampled_from(STATES), st.booleans(), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_any_register_and_any_value_do_no_more_than_the_ptp_says(
    state: int, granted: bool, offset: int, value: int
) -> None:
    device, model = new_device(state, granted, 0), Model(state, granted, 0)
    assert lib.crb_write(device, offset, value) == model.write(offset, value)
    assert (device.state, device.granted, device.error) == (model.state, model.granted, model.error)


class Life(RuleBasedStateMachine):
    """Any sequence of writes and ends of commands."""

    @initialize()
    def power_on(self) -> None:
        self.device, self.model = new_device(IDLE, False, 0), Model(IDLE, False, 0)

    @rule(register=st.sampled_from(Register), value=st.sampled_from(VALUES))
    def write(self, register: Register, value: int) -> None:
        assert lib.crb_write(self.device, register, value) == self.model.write(register, value)

    @rule(error=st.sampled_from(AttachError))
    def complete(self, error: AttachError) -> None:
        if self.model.state == EXECUTION:
            lib.crb_complete(self.device, error)
            self.model.state, self.model.error = COMPLETION, error

    @invariant()
    def registers_tell_the_state(self) -> None:
        device, model = self.device, self.model
        assert (device.state, device.granted, device.error) == (model.state, model.granted, model.error)
        assert lib.crb_ctrl_sts(device) == (2 if model.state == IDLE else 0) | (1 if model.error else 0)
        assert lib.crb_loc_state(device) == 0x81 | (2 if model.granted else 0)
        assert lib.crb_loc_sts(device) == int(model.granted)

    @invariant()
    def nothing_runs_without_the_locality(self) -> None:
        assert self.model.granted or self.device.state == IDLE


TestLife = Life.TestCase


def overlap(first: int, first_bytes: int, second: int, second_bytes: int) -> bool:
    return first < second + second_bytes and second < first + first_bytes


addresses = st.integers(0, 0x9000) | st.integers(0, (1 << 64) - 1)
sizes = st.integers(0, 0x9000) | st.integers(0, 0xFFFFFFFF)


@pytest.mark.attack("A12")
@given(addresses, sizes)
@example(0x7F, 1)
@example(0x80, 1)
@example(0x80, 0xF80)
@example(0x80, 0xF81)
@example(0x1FFF, 1)
@example(0x2000, 0x6000)
@example(0x2000, 0x6001)
@example(0x7FFF, 1)
@example(0x8000, 1)
@example(0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF)
@example(0xFFFFFFFFFFFFE000, 0x2000)
def test_a_frame_lies_in_the_memory_and_touches_neither_registers_nor_attach_page(address: int, size: int) -> None:
    fits = address + size <= 0x8000
    touches = overlap(address, size, 0, 0x80) or overlap(address, size, 0x1000, 0x1000)
    assert lib.crb_is_frame_area(address, size) == (size > 0 and fits and not touches)


def test_the_default_addresses_are_frame_areas_that_do_not_overlap() -> None:
    assert lib.crb_is_frame_area(crb.COMMAND_ADDRESS, crb.COMMAND_BYTES)
    assert lib.crb_is_frame_area(crb.RESPONSE_ADDRESS, crb.RESPONSE_BYTES)
    assert not overlap(crb.COMMAND_ADDRESS, crb.COMMAND_BYTES, crb.RESPONSE_ADDRESS, crb.RESPONSE_BYTES)
