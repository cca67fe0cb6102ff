"""HTTP and WebSocket connections that do not wait for ever: for a request that does not come, for an answer that is not taken.

uvicorn has no such bounds: a client could keep a connection, and what belongs to it, by sending or taking next to nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class _Taking:
    """Breaks a connection off whose peer takes nothing for `patience_s`."""

    patience_s: float
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _stuck: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._stuck = self.loop.call_later(self.patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]
        self._unstick()

    def connection_lost(self, error: Exception | None) -> None:
        self._unstick()
        super().connection_lost(error)  # type: ignore[misc]

    def _unstick(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


class _Http(_Taking, H11Protocol):
    """Also looks, every `patience_s`, whether a request has come since it looked last."""

    _seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self.patience_s, self._look)

    def _look(self) -> None:
        if self not in self.connections:  # closed, or a WebSocket by now
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is self._seen:
            self.transport.abort()
            return
        self._seen = self.cycle
        self.loop.call_later(self.patience_s, self._look)


class _WebSocket(_Taking, WebSocketsSansIOProtocol):
    pass


def protocols(patience_s: float) -> tuple[type[Any], type[Any]]:
    """uvicorn's classes for HTTP and for WebSockets, with this patience."""
    bounds = {"patience_s": patience_s}
    return type("Http", (_Http,), bounds), type("WebSocket", (_WebSocket,), bounds)
