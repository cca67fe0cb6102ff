"""Frames over a socket of this SP, on which whoever relays a channel has come in. Every byte from it is hostile."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from contextlib import suppress

from spvtpm.wire.framing import FrameDecoder, encode_frames
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

_SEND_S = 60.0
_READ_BYTES = 1 << 18


class RelaySocket:
    """Frames to and from the other side, through whoever carries them.

    Args:
        connection: non-blocking.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = FrameDecoder(MAX_CHANNEL_FRAME_BYTES)
        self._waiting: deque[bytes] = deque()

    async def receive(self) -> bytes:
        """The next frame.

        Raises:
            FrameError: it is too long, or empty.
            ConnectionError: there is none.
        """
        await self._fill()
        return self._waiting.popleft()

    async def receive_some(self) -> list[bytes]:
        """The next frames, all that have come; at least one.

        Raises:
            as `receive`.
        """
        await self._fill()
        frames = list(self._waiting)
        self._waiting.clear()
        return frames

    async def _fill(self) -> None:
        while not self._waiting:
            data = await asyncio.get_running_loop().sock_recv(self._connection, _READ_BYTES)
            if not data:
                raise ConnectionResetError
            self._waiting += self._decoder.feed(data)

    def hang_up(self) -> None:
        """Nothing more comes or goes; whoever waits for that learns it."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def hear_no_more(self) -> None:
        """Nothing more comes; whoever waits for that learns it."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RD)

    async def send(self, *frames: bytes) -> None:
        """Hands frames over.

        Raises:
            OSError: nobody takes them, or not in time.
        """
        async with asyncio.timeout(_SEND_S):
            await asyncio.get_running_loop().sock_sendall(self._connection, encode_frames(frames))
