"""Frames over a unix socket, in the event loop: one request, one answer. For all that the agent asks of others on its host."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from spvtpm.files.unix_sockets import peer_of
from spvtpm.wire.errors import FrameError, NotRunning, PermissionRefused, ResourceError
from spvtpm.wire.framing import encode_frame

LENGTH_BYTES: Final = 4
_BUFFER_BYTES: Final = 1 << 16


class FrameStream:
    """A connection on which frames go both ways. Neither side holds more than a frame and a buffer of what the other sends.

    Args:
        reader: of the connection.
        writer: of the connection.
        max_frame_bytes: the longest frame that the other side may send.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_frame_bytes: int) -> None:
        self._reader = reader
        self._writer = writer
        self._max = max_frame_bytes
        writer.transport.set_write_buffer_limits(high=_BUFFER_BYTES)

    @property
    def peer_pid(self) -> int:
        """Process id of whoever listened."""
        return peer_of(self._writer.get_extra_info("socket")).pid

    async def send(self, frame: bytes) -> None:
        """Hands a frame over; returns once the other side has taken what came before it, or nearly.

        Raises:
            OSError: nobody takes it.
        """
        self._writer.write(encode_frame(frame))
        await self._writer.drain()

    async def receive(self) -> bytes | None:
        """The next frame; None: there is none, the other side has closed.

        Raises:
            FrameError: it is too long, empty, or cut off.
            OSError: the connection broke.
        """
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
            if not 0 < length <= self._max:
                raise FrameError(f"a frame announces {length} bytes; allowed are 1 to {self._max}")
            return await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as cut:
            if cut.partial or cut.expected != LENGTH_BYTES:
                raise FrameError("the stream ended inside a frame") from None
            return None


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
    try:
        reader, writer = await asyncio.open_unix_connection(os.fspath(path), limit=_BUFFER_BYTES)
    except PermissionError:
        raise PermissionRefused(f"this user may not connect to {path}") from None
    except OSError as error:
        raise NotRunning(f"no {name} answers at {path}: {error.strerror or error}") from None
    try:
        stream = FrameStream(reader, writer, max_frame_bytes)
        if pid is not None and stream.peer_pid != pid:
            raise NotRunning(f"at {path} is not the {name}, but another process")
        yield stream
    finally:
        writer.transport.abort()


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
