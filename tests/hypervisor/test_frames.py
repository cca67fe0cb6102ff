"""Frames over a unix socket in the event loop: what was said before the end is heard, however the end comes."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from spvtpm.hypervisor.frames import FrameStream, connected
from spvtpm.wire.errors import FrameError
from spvtpm.wire.framing import encode_frame

MAX_BYTES = 1 << 16


@pytest.fixture
def listener(tmp_path: Path) -> socket.socket:
    it = socket.socket(socket.AF_UNIX)
    it.bind(str(tmp_path / "s"))
    it.listen()
    it.settimeout(20)
    return it


async def _send_until_nobody_takes_it(stream: FrameStream) -> None:
    with pytest.raises(OSError):
        while True:
            await stream.send(bytes(MAX_BYTES))


def test_the_last_words_of_who_closes_are_heard_though_he_was_sent_more(listener: socket.socket) -> None:
    words = [bytes([number]) * 1000 for number in range(100)]

    async def talk() -> list[bytes | None]:
        async with connected(Path(listener.getsockname()), "peer", MAX_BYTES) as stream:
            end, _ = listener.accept()
            sending = asyncio.ensure_future(_send_until_nobody_takes_it(stream))
            await asyncio.sleep(0)
            with end:  # closed with something unread
                end.sendall(b"".join(map(encode_frame, words)))
            await sending
            return [await stream.receive() for _ in words]

    with listener:
        assert asyncio.run(talk()) == words


@pytest.mark.attack("A25")
@pytest.mark.parametrize("sent", [b"\0", b"\0\0\0\0", (MAX_BYTES + 1).to_bytes(4, "big"), encode_frame(b"whole")[:-1]])
def test_what_is_no_frame_is_refused(listener: socket.socket, sent: bytes) -> None:
    async def hear() -> None:
        async with connected(Path(listener.getsockname()), "peer", MAX_BYTES) as stream:
            end, _ = listener.accept()
            with end:
                end.sendall(sent)
            await stream.receive()

    with listener, pytest.raises(FrameError):
        asyncio.run(hear())
