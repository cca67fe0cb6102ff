"""Server-sent events of operations: what each is now, then each change, until it has ended. The API comes in.

One poller looks for all streams of this process. A reader who is slow misses what lies between, never the end.

Source: HTML Living Standard, section 9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec

from spvtpm.cloud import queries
from spvtpm.cloud.places import Places
from spvtpm.wire.platform_errors import Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from starlette.types import Receive, Scope, Send

    from spvtpm.wire.platform_api import Operation

EVENT_STREAM_TYPE: Final = "text/event-stream"
POLL_S: Final = 0.2
PING_S: Final = 15.0
"""After so long without a change a comment is sent: whoever is between keeps the connection, and a dead one is noticed."""

logger = logging.getLogger(__name__)
_Found = TypeVar("_Found")


class Read(Protocol):
    """Looks into the database; `Platform.read`."""

    def __call__(self, look: Callable[[Connection], _Found]) -> Awaitable[_Found]: ...


class Follower:
    """One stream's view of its operation.

    Attributes:
        newest: what the operation is now.
        is_over: whether there will be no more, because this process ends.
        woken: set when any of it has changed.
    """

    def __init__(self, first: Operation) -> None:
        self.newest = first
        self.is_over = False
        self.woken = asyncio.Event()

    def show(self, operation: Operation) -> None:
        """The operation was looked at."""
        if operation != self.newest:
            self.newest = operation
            self.woken.set()

    def end(self) -> None:
        """There will be no more."""
        self.is_over = True
        self.woken.set()


class Streams:
    """All streams of this process.

    Attributes:
        is_closed: whether this process ends, so that streams of all kinds end.
    """

    def __init__(self, read: Read, per_user: int) -> None:
        """
        Args:
            read: looks into the database.
            per_user: streams of one user at a time.
        """
        self._read = read
        self._places = Places(per_user, "event streams of this user")
        self._followers: dict[uuid.UUID, set[Follower]] = {}
        self._poller: asyncio.Task[None] | None = None
        self.is_closed = False

    @contextmanager
    def following(self, user: str, operation: Operation) -> Iterator[Follower]:
        """Follows an operation.

        Args:
            user: who does.
            operation: as it is now.

        Raises:
            TooMany: the user has as many streams as he may.
        """
        follower = Follower(operation)
        with self._places.taken(user):
            self._followers.setdefault(operation.operation_id, set()).add(follower)
            if self.is_closed:
                follower.end()
            elif self._poller is None:
                self._poller = asyncio.get_running_loop().create_task(self._poll())
            try:
                yield follower
            finally:
                others = self._followers[operation.operation_id]
                others.discard(follower)
                if not others:
                    del self._followers[operation.operation_id]

    def close(self) -> None:
        """Ends all streams, and those that would begin."""
        self.is_closed = True
        for followers in self._followers.values():
            for follower in followers:
                follower.end()

    async def _poll(self) -> None:
        try:
            while self._followers and not self.is_closed:
                await asyncio.sleep(POLL_S)
                with suppress(Unavailable):  # streams wait until the database is back
                    await self._look()
        except Exception:
            logger.exception("streams of events are ended by a defect")
            for followers in self._followers.values():
                for follower in followers:
                    follower.end()
        finally:
            self._poller = None

    async def _look(self) -> None:
        wanted = set(self._followers)
        found = await self._read(lambda connection: queries.find_operations(connection, wanted))
        for operation_id, operation in found.items():
            for follower in self._followers.get(operation_id, ()):
                follower.show(operation)


class EventStream:
    """The response: an ASGI application."""

    def __init__(self, streams: Streams, user: str, operation: Operation) -> None:
        """
        Args:
            streams: of this process.
            user: who reads.
            operation: as it is now.

        Raises:
            TooMany: the user has as many streams as he may.
        """
        self._following = streams.following(user, operation)
        self._follower = self._following.__enter__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        follower = self._follower
        gone = asyncio.get_running_loop().create_task(_disconnected(receive))
        gone.add_done_callback(lambda _: follower.woken.set())
        try:
            headers = [(b"content-type", EVENT_STREAM_TYPE.encode()), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if scope["method"] == "GET":
                await _tell(follower, gone, send)
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self._following.__exit__(None, None, None)


async def _tell(follower: Follower, gone: asyncio.Task[None], send: Send) -> None:
    """Until the operation has ended, the reader has gone, or this process ends."""
    told: Operation | None = None
    while not gone.done():
        follower.woken.clear()
        if follower.newest != told:
            told = follower.newest
            body = b"event: operation\ndata: " + msgspec.json.encode(told) + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if told.state in {"done", "failed"} or follower.is_over:
            return
        try:
            async with asyncio.timeout(PING_S):
                await follower.woken.wait()
        except TimeoutError:
            await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
