"""Frames over a socket of this SP, on which whoever relays a channel has come in. Every byte from it is hostile."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from spvtpm.wire.framing import FrameDecoder, encode_frame
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
        self._waiting: list[bytes] = []

    async def receive(self) -> bytes:
        """The next frame.

        Raises:
            FrameError: it is too long, or empty.
            ConnectionError: there is none.
        """
        while not self._waiting:
            data = await asyncio.get_running_loop().sock_recv(self._connection, _READ_BYTES)
            if not data:
                raise ConnectionResetError
            self._waiting += self._decoder.feed(data)
        return self._waiting.pop(0)

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
            for frame in frames:
                await asyncio.get_running_loop().sock_sendall(self._connection, encode_frame(frame))
