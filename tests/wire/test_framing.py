"""The outermost bound on what a peer can make this side hold."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire.errors import FrameError
from spvtpm.wire.framing import MAX_FRAME_BYTES, FrameDecoder, encode_frame

payloads = st.lists(st.binary(min_size=1, max_size=300), max_size=8)


@given(payloads, st.data())
def test_frames_come_back_whole_however_the_stream_is_cut(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(frame) for frame in frames)
    decoder = FrameDecoder()
    decoded: list[bytes] = []

    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        decoded += decoder.feed(stream[:cut])
        stream = stream[cut:]

    decoder.finish()
    assert decoded == frames


@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_stream_that_ends_inside_a_frame_is_refused(frame: bytes, data: st.DataObject) -> None:
    stream = encode_frame(frame)
    decoder = FrameDecoder()
    assert decoder.feed(stream[: data.draw(st.integers(1, len(stream) - 1))]) == []

    with pytest.raises(FrameError):
        decoder.finish()


@given(st.integers(1, 5000), st.integers(0, 0xFFFFFFFF))
def test_a_length_is_refused_when_announced_and_not_when_received(bound: int, length: int) -> None:
    decoder = FrameDecoder(bound)

    if 0 < length <= bound:
        assert decoder.feed(struct.pack(">I", length)) == []
    else:
        with pytest.raises(FrameError):
            decoder.feed(struct.pack(">I", length))


@pytest.mark.parametrize("size_bytes", [0, MAX_FRAME_BYTES + 1])
def test_what_the_other_side_must_refuse_is_never_sent(size_bytes: int) -> None:
    with pytest.raises(FrameError):
        encode_frame(bytes(size_bytes))


def test_the_longest_frame_passes() -> None:
    frame = bytes(MAX_FRAME_BYTES)
    assert FrameDecoder().feed(encode_frame(frame)) == [frame]
