"""Length-prefixed frames over a byte stream: the outermost bound on what a peer can make this side hold.

A frame is a 32-bit big-endian length, then that many bytes. Sans-IO: bytes in, whole frames out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from spvtpm.wire.errors import FrameError

MAX_FRAME_BYTES = 1 << 20
"""Upper bound of one frame's payload; the largest legitimate one is a full TPM state of about 200 KiB."""

_LENGTH = struct.Struct(">I")


def encode_frame(payload: bytes) -> bytes:
    """One frame.

    Args:
        payload: 1 to `MAX_FRAME_BYTES` bytes.

    Raises:
        FrameError: the payload is empty or too long.
    """
    return encode_frames((payload,))


def encode_frames(payloads: Iterable[bytes]) -> bytes:
    """Frames, one behind the other.

    Args:
        payloads: 1 to `MAX_FRAME_BYTES` bytes each.

    Raises:
        FrameError: a payload is empty or too long.
    """
    parts: list[bytes] = []
    for payload in payloads:
        if not 0 < len(payload) <= MAX_FRAME_BYTES:
            raise FrameError(f"a frame carries 1 to {MAX_FRAME_BYTES} bytes, not {len(payload)}")
        parts += _LENGTH.pack(len(payload)), payload
    return b"".join(parts)


class FrameDecoder:
    """Cuts a stream back into frames. After an error the stream is lost: close it.

    Args:
        max_frame_bytes: the longest payload this peer may send.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes of the stream; returns the frames they complete, oldest first.

        Raises:
            FrameError: a frame announces no bytes, or more than the bound.
        """
        self._buffer += data
        frames: list[bytes] = []
        at = 0
        with memoryview(self._buffer) as stream:  # a slice of it copies nothing
            while len(stream) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(stream, at)
                if not 0 < length <= self._max:
                    raise FrameError(f"a frame announces {length} bytes; allowed are 1 to {self._max}")
                end = at + _LENGTH.size + length
                if len(stream) < end:
                    break
                frames.append(bytes(stream[at + _LENGTH.size : end]))
                at = end
        del self._buffer[:at]
        return frames

    def finish(self) -> None:
        """Says that the stream has ended.

        Raises:
            FrameError: it ended in the middle of a frame.
        """
        if self._buffer:
            raise FrameError(f"the stream ended inside a frame ({len(self._buffer)} bytes were left over)")
