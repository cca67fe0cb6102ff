"""One client's control connection to a TPM emulator: requests in, with a descriptor or without; answers out."""

from __future__ import annotations

import asyncio
import os
import select
import socket

from spvtpm.wire.swtpm_control import MAX_REQUEST_BYTES, is_cut_off

_REST_S = 0.5
"""The rest of a request must come within this time. Source: swtpm, src/swtpm/ctrlchannel.c."""

_MAX_DESCRIPTORS = 4


class ControlConnection:
    """Requests one after the other.

    Args:
        connection: does not block; the object's from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._descriptors: list[int] = []

    async def receive(self) -> bytes:
        """The next request as it came; empty at the end. QEMU and swtpm's tools send one, and wait for its answer.

        Raises:
            OSError: the connection broke.
        """
        data = await self._read()
        try:
            async with asyncio.timeout(_REST_S):
                while data and is_cut_off(data) and (more := await self._read()):
                    data += more
        except TimeoutError:
            pass
        return data

    async def _read(self) -> bytes:
        while True:
            try:
                data, descriptors, _flags, _address = socket.recv_fds(
                    self._socket, MAX_REQUEST_BYTES + 1, _MAX_DESCRIPTORS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._readable()
                continue
            self.drop_descriptors()
            self._descriptors = descriptors
            return data

    async def _readable(self) -> None:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._socket, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._socket)

    def take_descriptor(self) -> int | None:
        """The one descriptor that came with the last request; the caller's from now on. None if there was none, or several."""
        if len(self._descriptors) != 1:
            return None
        return self._descriptors.pop()

    def drop_descriptors(self) -> None:
        """Nobody wants those that came."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    async def send(self, answer: bytes) -> None:
        """Sends an answer whole.

        Raises:
            OSError: the connection broke.
        """
        await asyncio.get_running_loop().sock_sendall(self._socket, answer)

    def has_ended(self) -> bool:
        """Whether the client has hung up, even if what it said before is not heard yet."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Hangs up."""
        self.drop_descriptors()
        self._socket.close()
