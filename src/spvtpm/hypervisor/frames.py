"""Frames over a unix socket, in the event loop: one request, one answer. For all that the agent asks of others on its host."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from spvtpm.files.unix_sockets import peer_of
from spvtpm.wire.errors import NotRunning, PermissionRefused, ResourceError
from spvtpm.wire.framing import FrameDecoder, encode_frame

_BUFFER_BYTES: Final = 1 << 16


class FrameStream:
    """A connection on which frames go both ways. Neither side holds more than a frame and a buffer of what the other sends.

    The socket itself, and no asyncio stream: that one drops what it has not read yet when a write fails, and so the last
    words of whoever closes while he is still being sent to.

    Args:
        connection: connected, non-blocking.
        max_frame_bytes: the longest frame that the other side may send.
    """

    def __init__(self, connection: socket.socket, max_frame_bytes: int) -> None:
        self._connection = connection
        self._decoder = FrameDecoder(max_frame_bytes)
        self._frames: deque[bytes] = deque()

    @property
    def peer_pid(self) -> int:
        """Process id of whoever listened."""
        return peer_of(self._connection).pid

    async def send(self, frame: bytes) -> None:
        """Hands a frame over; returns once the kernel has all of it.

        Raises:
            OSError: nobody takes it. What the other side has said before can still be received.
        """
        await asyncio.get_running_loop().sock_sendall(self._connection, encode_frame(frame))

    async def receive(self) -> bytes | None:
        """The next frame; None: there is none, the other side has closed.

        Raises:
            FrameError: it is too long, empty, or cut off.
            OSError: the connection broke.
        """
        while not self._frames:
            data = await asyncio.get_running_loop().sock_recv(self._connection, _BUFFER_BYTES)
            if not data:
                self._decoder.finish()
                return None
            self._frames.extend(self._decoder.feed(data))
        return self._frames.popleft()


@asynccontextmanager
async def connected(path: Path, name: str, max_frame_bytes: int, pid: int | None = None) -> AsyncIterator[FrameStream]:
    """A connection to whoever listens at `path`.

    Args:
        path: of the socket.
        name: of who should be there, for sentences.
        max_frame_bytes: the longest frame that it may send.
        pid: its process id, where a link might lead to somebody else; None: whoever listens there.

    Raises:
        NotRunning: nobody listens there, or somebody else.
        PermissionRefused: this user may not connect.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, os.fspath(path))
        except PermissionError:
            raise PermissionRefused(f"this user may not connect to {path}") from None
        except OSError as error:
            raise NotRunning(f"no {name} answers at {path}: {error.strerror or error}") from None
        stream = FrameStream(connection, max_frame_bytes)
        if pid is not None and stream.peer_pid != pid:
            raise NotRunning(f"at {path} is not the {name}, but another process")
        yield stream


async def ask(
    path: Path, name: str, request: bytes, max_frame_bytes: int, timeout_s: float, pid: int | None = None
) -> bytes:
    """One request on a connection of its own, and its answer.

    Args:
        path: of the socket.
        name: of who should be there, for sentences.
        request: a frame.
        max_frame_bytes: the longest answer.
        timeout_s: how long it may take.
        pid: as of `connected`.

    Raises:
        NotRunning: nobody is there, or not any more: what was asked may have been done or not.
        PermissionRefused: this user may not connect.
        ResourceError: it did not answer in time.
        FrameError: what it sends is no frame.
    """
    try:
        async with asyncio.timeout(timeout_s), connected(path, name, max_frame_bytes, pid) as stream:
            await stream.send(request)
            answer = await stream.receive()
    except TimeoutError:
        raise ResourceError(f"the {name} did not answer in time") from None
    except OSError as error:
        raise NotRunning(f"the connection to the {name} broke: {error.strerror or error}") from None
    if answer is None:
        raise NotRunning(f"the {name} closed the connection")
    return answer
