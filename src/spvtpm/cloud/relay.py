"""Relays frames between a user's terminal and a host's agent, and can read none of them. The API comes in.

What it sees is counted and logged: who, where, how many frames, how many bytes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from spvtpm.cloud import auth
from spvtpm.cloud.agent_sockets import CLOSE_S, connect_agent
from spvtpm.cloud.answers import problem_answer
from spvtpm.wire.errors import SpvtpmError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from spvtpm.cloud.auth import Principal
    from spvtpm.cloud.host_addresses import AgentAddress
    from spvtpm.cloud.platform import Platform

# RFC 6455, section 7.4.1.
_NORMAL, _GOING_AWAY, _UNSUPPORTED, _DEFECT = 1000, 1001, 1003, 1011
_PASSED_ON: Final = frozenset({_NORMAL, _GOING_AWAY, _UNSUPPORTED, 1008, 1009, _DEFECT, 1012, 1013})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a relay leads.

    Attributes:
        agent: of the host.
        path: at that agent.
        what: words for the log, with an id.
    """

    agent: AgentAddress
    path: str
    what: str


@dataclass(slots=True)
class _Count:
    frames: int = 0
    octets: int = 0

    def add(self, frame: bytes) -> None:
        self.frames += 1
        self.octets += len(frame)

    def __str__(self) -> str:
        return f"{self.frames} frames, {self.octets} bytes"


@dataclass(frozen=True, slots=True)
class _End:
    code: int
    why: str


async def serve_relay(
    platform: Platform, websocket: WebSocket, find: Callable[[Connection, Principal], Target]
) -> None:
    """Serves one WebSocket of a user.

    Args:
        platform: this replica.
        websocket: not yet accepted.
        find: where it leads; raises if this user may not go there.
    """

    def look(connection: Connection) -> tuple[Principal, Target]:
        principal = auth.authenticate(connection, websocket.headers.get("authorization"))
        principal.require("vms")
        return principal, find(connection, principal)

    with ExitStack() as places:
        try:
            principal, target = await platform.read(look)
            places.enter_context(platform.relays_of_user.taken(principal.user))
            places.enter_context(platform.relays_of_host.taken(target.agent.host))
            places.enter_context(platform.relays.taken())
            upstream = await connect_agent(target.agent, target.path)
        except SpvtpmError as error:
            await websocket.send_denial_response(problem_answer(error))
            return
        try:
            await websocket.accept()
            await _Relay(websocket, upstream, platform.config.limits.relay_idle_s).run(principal.user, target)
        finally:
            await upstream.close()


class _Relay:
    """Two directions between two WebSockets; each waits for its receiver before it takes more from its sender."""

    def __init__(self, websocket: WebSocket, upstream: ClientConnection, idle_s: float) -> None:
        self._websocket = websocket
        self._upstream = upstream
        self._idle_s = idle_s
        self._moved_s = time.monotonic()
        self._up, self._down = _Count(), _Count()

    async def run(self, user: str, target: Target) -> None:
        begun_s = time.monotonic()
        tasks = [asyncio.ensure_future(way) for way in (self._upwards(), self._downwards(), self._watch())]
        end = _End(_GOING_AWAY, "the platform ends")
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            end = next(task for task in tasks if task.done()).result()
        except Exception:
            end = _End(_DEFECT, "a defect of the platform")
            logger.exception("relay of %s", target.what)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            logger.info(
                "relayed %s, user %s, host %s: to the host %s; from it %s; %.1f s; %s",
                *(target.what, user, target.agent.host, self._up, self._down, time.monotonic() - begun_s, end.why),
            )
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):  # it may be gone already
            async with asyncio.timeout(CLOSE_S):
                await self._websocket.close(end.code, end.why)

    async def _upwards(self) -> _End:
        is_heard = True
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return _End(_NORMAL, "the user's side ended it")
            frame = message.get("bytes")
            if frame is None:
                return _End(_UNSUPPORTED, "text came, and frames are binary")
            if is_heard:
                try:
                    await self._upstream.send(frame)
                except ConnectionClosed:
                    is_heard = False  # what it has said before is perhaps not passed on yet: `_downwards` ends this
                else:
                    self._count(self._up, frame)

    async def _downwards(self) -> _End:
        while True:
            try:
                frame = await self._upstream.recv()
            except ConnectionClosed as closed:
                return _closed(closed)
            if isinstance(frame, str):
                return _End(_DEFECT, "the host sent text, and frames are binary")
            try:
                await self._websocket.send_bytes(frame)
            except (WebSocketDisconnect, RuntimeError):
                return _End(_NORMAL, "the user's side ended it")
            self._count(self._down, frame)

    async def _watch(self) -> _End:
        while True:
            left_s = self._moved_s + self._idle_s - time.monotonic()
            if left_s <= 0:
                return _End(_GOING_AWAY, "nothing came through for too long")
            await asyncio.sleep(left_s)

    def _count(self, count: _Count, frame: bytes) -> None:
        count.add(frame)
        self._moved_s = time.monotonic()


def _closed(closed: ConnectionClosed) -> _End:
    code = closed.rcvd.code if closed.rcvd is not None else _DEFECT
    return _End(code if code in _PASSED_ON else _DEFECT, "the host's side ended it")
