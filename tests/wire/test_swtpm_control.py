"""The swtpm control protocol as its clients speak it: numbers typed in from swtpm's tpm_ioctl.h."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire.swtpm_control import ControlCommand, answer_control

# Source: swtpm include/swtpm/tpm_ioctl.h, enum of CMD_*; libtpms/tpm_error.h.
CMD_GET_CAPABILITY = 1
CMD_INIT = 2
CMD_SHUTDOWN = 3
CMD_SET_LOCALITY = 5
CMD_CANCEL = 9
CMD_SET_STATEBLOB = 13
PTM_CAP_SET_LOCALITY = 1 << 3
PTM_CAP_CANCEL_TPM_CMD = 1 << 5
TPM_SUCCESS = 0
TPM_BAD_PARAMETER = 3
TPM_BAD_ORDINAL = 10
TPM_BAD_LOCALITY = 61


def result_of(request: bytes) -> int:
    answer, _command = answer_control(request)
    result: int = struct.unpack_from(">I", answer)[0]
    return result


def test_capabilities_are_locality_and_cancel_and_nothing_else() -> None:
    answer, command = answer_control(struct.pack(">I", CMD_GET_CAPABILITY))
    assert answer == struct.pack(">II", TPM_SUCCESS, PTM_CAP_SET_LOCALITY | PTM_CAP_CANCEL_TPM_CMD)
    assert command is None


@pytest.mark.attack("A14")
@given(st.integers(0, 255), st.binary(max_size=8))
def test_only_locality_0_may_be_set(locality: int, trailing: bytes) -> None:
    result = result_of(struct.pack(">IB", CMD_SET_LOCALITY, locality) + trailing)
    assert result == (TPM_SUCCESS if locality == 0 else TPM_BAD_LOCALITY)


def test_a_locality_must_be_named() -> None:
    assert result_of(struct.pack(">I", CMD_SET_LOCALITY)) == TPM_BAD_PARAMETER


def test_cancel_is_handed_on() -> None:
    assert answer_control(struct.pack(">I", CMD_CANCEL)) == (bytes(4), ControlCommand.CANCEL_TPM_CMD)


@pytest.mark.parametrize("code", [CMD_INIT, CMD_SHUTDOWN, CMD_SET_STATEBLOB])
def test_power_and_state_are_not_the_clients_to_control(code: int) -> None:
    assert result_of(struct.pack(">III", code, 0, 0)) == TPM_BAD_ORDINAL


@given(st.binary(max_size=3))
def test_a_request_without_a_code_is_refused(request: bytes) -> None:
    assert result_of(request) == TPM_BAD_PARAMETER


@given(st.binary(max_size=80))
def test_every_request_gets_a_result(request: bytes) -> None:
    answer, command = answer_control(request)
    assert len(answer) in (4, 8)
    assert command in (None, ControlCommand.CANCEL_TPM_CMD)
