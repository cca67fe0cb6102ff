"""Around every request: an id for the log, headers that keep browsers from being clever, and an answer to defects."""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING, Final

from starlette.datastructures import MutableHeaders

from spvtpm.cloud.answers import defect_answer
from spvtpm.wire.decoding import printable

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Unless the answer has its own. There are none that let another origin's pages in."""

_RESPONSE_STARTS: Final = frozenset({"http.response.start", "websocket.http.response.start"})
_MAX_PATH: Final = 256

logger = logging.getLogger(__name__)


class Shell:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        """
        Args:
            app: what answers.
        """
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        begun_s = time.monotonic()
        status = 0

        async def send_more(message: Message) -> None:
            nonlocal status
            if message["type"] in _RESPONSE_STARTS:
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self._app(scope, receive, send_more)
        except Exception:
            logger.exception("request %s ran into a defect", request_id)
            if status:
                raise  # the answer has begun: all that is left is to break it off
            await defect_answer()(scope, receive, send_more)
        finally:
            path = printable(scope["path"][:_MAX_PATH])
            logger.info(
                "request %s: %s %s: %d in %.0f ms",
                *(request_id, scope.get("method", "WEBSOCKET"), path, status, (time.monotonic() - begun_s) * 1000),
            )
