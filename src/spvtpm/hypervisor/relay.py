"""Carries frames between a WebSocket and a unix socket of this host. What is in them, nobody here can read.

One binary message is one frame. Neither direction is read faster than the other side takes it: at most a few frames are held.

Why a relay ends is told by its close code (RFC 6455, section 7.4.1):

    1000  the other side has closed            1003  a text message
    1001  nothing went through for too long    1007  an empty message
    1008  the other side sends no frames       1009  a message that is longer than a frame may be
    1011  the other side takes nothing more
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from starlette.websockets import WebSocket, WebSocketDisconnect

from spvtpm.hypervisor.frames import FrameStream, connected
from spvtpm.wire.errors import FrameError, NotRunning, TooMany
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

log = logging.getLogger(__name__)

MAX_CHANNELS: Final = 56
"""Relays to the secure processor at a time. It takes 64: the agent itself knocks, too, and the host's administrator may."""

MAX_CONSOLES: Final = 64
"""Relays to VMs at a time."""

MAX_CONSOLES_OF_ONE_VM: Final = 8

CHANNEL_IDLE_S: Final = 330.0
"""Longer than the secure processor bears silence."""

MAX_LINKS: Final = 32
"""Relays to other secure processors at a time."""

LINK_IDLE_S: Final = 330.0

CONSOLE_IDLE_S: Final = 3600.0
"""A command may run for a while without a word."""

_TAKE_S: Final = 60.0
"""How long a side may take for one frame."""


class _Ended(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Slots:
    """So many relays at a time.

    Args:
        limit: in all.
        limit_of_one: of one key.
    """

    def __init__(self, limit: int, limit_of_one: int) -> None:
        self._limit = limit
        self._limit_of_one = limit_of_one
        self._taken: Counter[object] = Counter()

    @contextmanager
    def taken(self, key: object) -> Iterator[None]:
        """Has one.

        Raises:
            TooMany: there is none left.
        """
        if self._taken.total() >= self._limit:
            raise TooMany(f"this host relays {self._limit} connections of this kind at a time")
        if self._taken[key] >= self._limit_of_one:
            raise TooMany(f"this host relays {self._limit_of_one} connections to one VM's console at a time")
        self._taken[key] += 1
        try:
            yield
        finally:
            self._taken[key] -= 1
            if not self._taken[key]:
                del self._taken[key]


async def relay(
    websocket: WebSocket, path: Path, name: str, idle_s: float, pid: int | None = None, opening: bytes = b""
) -> None:
    """Carries frames until one side ends, falls silent, or does what it must not.

    Args:
        websocket: not accepted yet; it is once the other side is there.
        path: of the unix socket.
        name: of who should be there, for sentences.
        idle_s: how long both sides may be silent.
        pid: process id of who must be there; None: whoever listens.
        opening: a frame that goes to it first, of ours; empty: none.

    Raises:
        NotRunning: nobody listens there. The WebSocket is not accepted.
        PermissionRefused: this user may not connect. The WebSocket is not accepted.
    """
    async with connected(path, name, MAX_CHANNEL_FRAME_BYTES, pid) as stream:
        if opening:
            try:
                await stream.send(opening)
            except OSError as error:
                raise NotRunning(f"the {name} takes nothing: {error.strerror or error}") from None
        await websocket.accept()
        ended = await _Relay(websocket, stream, idle_s).run()
    log.info("a relay to the %s has ended: %s", name, ended.reason)
    with suppress(WebSocketDisconnect, RuntimeError):  # who is gone needs no word
        await websocket.close(ended.code, ended.reason)


class _Relay:
    def __init__(self, websocket: WebSocket, stream: FrameStream, idle_s: float) -> None:
        self._websocket = websocket
        self._stream = stream
        self._idle_s = idle_s
        self._last = time.monotonic()

    async def run(self) -> _Ended:
        """Both directions, until one of them ends."""
        ways = [asyncio.ensure_future(way) for way in (self._inwards(), self._outwards(), self._watch())]
        try:
            done, _others = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        error = next(iter(done)).exception()
        if isinstance(error, _Ended):
            return error
        if error is not None:
            log.error("a relay broke", exc_info=error)
        return _Ended(1011, "the relay broke")

    async def _inwards(self) -> None:
        try:
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    raise _Ended(1000, "the WebSocket was closed")
                frame = message.get("bytes")
                if frame is None:
                    raise _Ended(1003, "frames are binary messages")
                if not frame:
                    raise _Ended(1007, "a frame is never empty")
                if len(frame) > MAX_CHANNEL_FRAME_BYTES:
                    raise _Ended(1009, f"a frame has at most {MAX_CHANNEL_FRAME_BYTES} bytes")
                async with asyncio.timeout(_TAKE_S):
                    await self._stream.send(frame)
                self._last = time.monotonic()
        except TimeoutError:
            raise _Ended(1011, "the other side takes nothing more") from None
        except OSError:
            await self._heard_out()

    async def _heard_out(self) -> None:
        """Who takes nothing more may have said why; the other direction has the last word."""
        await asyncio.sleep(_TAKE_S)
        raise _Ended(1011, "the other side takes nothing more")

    async def _outwards(self) -> None:
        try:
            while True:
                frame = await self._stream.receive()
                if frame is None:
                    raise _Ended(1000, "the other side has closed")
                async with asyncio.timeout(_TAKE_S):
                    await self._websocket.send_bytes(frame)
                self._last = time.monotonic()
        except FrameError:
            raise _Ended(1008, "the other side sends no frames") from None
        except TimeoutError:
            raise _Ended(1011, "the WebSocket takes nothing more") from None
        except (WebSocketDisconnect, RuntimeError):
            raise _Ended(1000, "the WebSocket was closed") from None
        except OSError:
            raise _Ended(1000, "the other side has closed") from None

    async def _watch(self) -> None:
        while (left := self._last + self._idle_s - time.monotonic()) > 0:
            await asyncio.sleep(left)
        raise _Ended(1001, "nothing went through for too long")
