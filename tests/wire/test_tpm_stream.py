"""TPM commands cut out of a byte stream."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire.errors import FrameError, InterfaceError
from spvtpm.wire.tpm_stream import MAX_COMMAND_BYTES, CommandDecoder, ensure_started, error_response
from tests import tpm_commands as tpm

commands = st.builds(
    lambda code, body: struct.pack(">HII", 0x8001, 10 + len(body), code) + body,
    st.integers(0, 0xFFFFFFFF),
    st.binary(max_size=100),
)


@given(st.lists(commands, max_size=6), st.data())
def test_commands_come_back_whole_however_the_stream_is_cut(sent: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(sent)
    decoder = CommandDecoder()
    decoded: list[bytes] = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        decoded += decoder.feed(stream[:cut])
        stream = stream[cut:]
    assert decoded == sent


@given(st.integers(0, 0xFFFFFFFF))
def test_a_size_is_refused_when_announced(size: int) -> None:
    header = struct.pack(">HII", 0x8001, size, 0x17B)
    if 10 < size <= MAX_COMMAND_BYTES:
        assert CommandDecoder().feed(header) == []
    elif size == 10:
        assert CommandDecoder().feed(header) == [header]
    else:
        with pytest.raises(FrameError):
            CommandDecoder().feed(header)


@given(st.integers(0, 0xFFFFFFFF))
def test_an_error_response_is_a_header_and_nothing_else(code: int) -> None:
    response = error_response(code)
    assert tpm.response_code(response) == code
    assert struct.unpack_from(">I", response, 2)[0] == len(response) == 10


@pytest.mark.parametrize("code", [tpm.RC_SUCCESS, tpm.RC_INITIALIZE])
def test_a_tpm_that_starts_or_has_been_started_is_started(code: int) -> None:
    sent: list[bytes] = []

    def transmit(command: bytes) -> bytes:
        sent.append(command)
        return error_response(code)

    ensure_started(transmit)
    assert sent == [tpm.startup()]


@given(
    st.integers(1, 0xFFFFFFFF).filter(lambda code: code != tpm.RC_INITIALIZE).map(error_response)
    | st.binary(max_size=9)
)
def test_a_tpm_that_does_not_start_is_told(response: bytes) -> None:
    with pytest.raises(InterfaceError):
        ensure_started(lambda _command: response)
