"""A page that is kept up to date: server-sent events, each the part of the page that changes, rendered here. Routes come in.

    event: page    data: JSON with `title`, `announcement` and `html`; first what is now, then whenever it differs
    event: end     nothing of it will change any more
    event: reload  the reader may not see it any more, or it is gone: the whole page will say

Source: HTML Living Standard, section 9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.responses import Response, StreamingResponse

from spvtpm.cloud.console.pages import SECURITY_HEADERS
from spvtpm.cloud.streams import EVENT_STREAM_TYPE
from spvtpm.wire.errors import SpvtpmError, TooMany
from spvtpm.wire.platform_errors import Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from starlette.types import Receive, Scope, Send

    from spvtpm.cloud.console.views import View
    from spvtpm.cloud.places import Places
    from spvtpm.cloud.platform import Platform

POLL_S: Final = 0.5
AGAIN_S: Final = 10.0
"""After so long without a change it is sent all the same: its relative times go on, and a dead connection is noticed."""


_RELOAD: Final = b"event: reload\ndata:\n\n"


def have_it_reloaded() -> Response:
    """The answer instead of a live page, where there is none for this reader."""
    return Response(_RELOAD, 200, SECURITY_HEADERS, EVENT_STREAM_TYPE)


class LivePage:
    """The response: an ASGI application."""

    def __init__(
        self,
        platform: Platform,
        places: Places,
        user: str,
        look: Callable[[Connection], View],
        render: Callable[[View], str],
    ) -> None:
        """
        Args:
            platform: of this replica.
            places: for the streams of each user.
            user: who reads.
            look: sees whether the reader may, and looks.
            render: makes HTML of what was seen.
        """
        self._platform = platform
        self._places = places
        self._user = user
        self._look = look
        self._render = render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._places.taken(self._user):
                await StreamingResponse(self._events(), 200, SECURITY_HEADERS, EVENT_STREAM_TYPE)(scope, receive, send)
        except TooMany:
            await Response(status_code=429, headers=SECURITY_HEADERS)(scope, receive, send)

    async def _events(self) -> AsyncIterator[bytes]:
        told: View | None = None
        told_s = time.monotonic()
        while not self._platform.streams.is_closed:
            try:
                view = await self._platform.read(self._look)
            except Unavailable:
                pass  # until the database is back
            except SpvtpmError:
                yield _RELOAD
                return
            else:
                if view != told or time.monotonic() - told_s >= AGAIN_S:
                    told, told_s = view, time.monotonic()
                    yield b"event: page\ndata: " + self._encode(view) + b"\n\n"
                if view.is_over:
                    yield b"event: end\ndata:\n\n"
                    return
            await asyncio.sleep(POLL_S)

    def _encode(self, view: View) -> bytes:
        told = {"title": view.title, "announcement": view.announcement, "html": self._render(view)}
        return msgspec.json.encode(told)  # JSON has no line ends of its own: an event's data is one line
