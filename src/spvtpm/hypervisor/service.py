"""The agent's API over HTTP: `wire/agent_api.py`. Whoever has the token may ask; every error is problem details."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import uuid
from pathlib import Path
from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from spvtpm.hypervisor.conductor import Conductor
from spvtpm.hypervisor.link_opening import link_opening
from spvtpm.hypervisor.relay import (
    CHANNEL_IDLE_S,
    CONSOLE_IDLE_S,
    LINK_IDLE_S,
    MAX_CHANNELS,
    MAX_CONSOLES,
    MAX_CONSOLES_OF_ONE_VM,
    MAX_LINKS,
    Slots,
    relay,
)
from spvtpm.hypervisor.secure_processor import NAME, SecureProcessor
from spvtpm.wire.agent_api import MAX_IMAGE_BYTES, Order
from spvtpm.wire.decoding import UNDECODABLE, in_words
from spvtpm.wire.errors import MessageError, NotFound, SpvtpmError
from spvtpm.wire.platform_errors import NoSuchToken, TooLarge, Unavailable
from spvtpm.wire.problems import PROBLEM_TYPE, problem_of

log = logging.getLogger(__name__)

MAX_ORDER_BYTES: Final = 4096
_BODY_S: Final = 60.0
_MAX_SEQUENCE: Final = (1 << 53) - 1


class Service:
    """What can be asked of an agent.

    Args:
        conductor: of the VMs.
        sp: the host's secure processor.
        token: that everybody must show.
        revocation_list: as of `link_opening`.
    """

    def __init__(self, conductor: Conductor, sp: SecureProcessor, token: str, revocation_list: Path | None) -> None:
        self._conductor = conductor
        self._sp = sp
        self._token = token
        self._revocation_list = revocation_list
        self._links = Slots(MAX_LINKS, MAX_LINKS)
        self._channels = Slots(MAX_CHANNELS, MAX_CHANNELS)
        self._consoles = Slots(MAX_CONSOLES, MAX_CONSOLES_OF_ONE_VM)

    def app(self) -> ASGIApp:
        """The application, for a server."""
        vm = "/v1/vms/{vm_id:uuid}"
        application = Starlette(
            routes=[
                Route("/v1/host", self._host, methods=["GET"]),
                Route("/v1/vms", self._vms, methods=["GET"]),
                Route(vm, self._vm, methods=["GET"]),
                Route(vm, self._order, methods=["PUT"]),
                Route(f"{vm}/image", self._image, methods=["GET"]),
                Route(f"{vm}/image", self._put_image, methods=["PUT"]),
                WebSocketRoute("/v1/channel", self._channel),
                WebSocketRoute(f"{vm}/console", self._console),
                WebSocketRoute(f"{vm}/link", self._link),
            ],
            exception_handlers={SpvtpmError: _refuse, HTTPException: _refuse_http, Exception: _confess},
        )
        return _TokenGate(application, self._token)

    async def _host(self, _request: Request) -> Response:
        return _json(await self._conductor.host())

    async def _vms(self, request: Request) -> Response:
        after = request.query_params.get("after")
        try:
            return _json(await self._conductor.reports(uuid.UUID(after) if after else None))
        except ValueError:
            raise MessageError("after is the id of a VM, or is left out") from None

    async def _vm(self, request: Request) -> Response:
        return _json(await self._conductor.report(request.path_params["vm_id"]))

    async def _order(self, request: Request) -> Response:
        body = await _body(request, MAX_ORDER_BYTES)
        try:
            order = msgspec.json.decode(body, type=Order)
        except UNDECODABLE as error:
            raise MessageError(f"this is no order: {in_words(error)}") from None
        return _json(await self._conductor.order(request.path_params["vm_id"], order))

    async def _image(self, request: Request) -> Response:
        image = await self._conductor.image(request.path_params["vm_id"])
        return Response(image, media_type="application/octet-stream")

    async def _put_image(self, request: Request) -> Response:
        text = request.query_params.get("sequence", "")
        if not (text.isascii() and text.isdecimal() and len(text) <= 16 and 0 < int(text) <= _MAX_SEQUENCE):
            raise MessageError("an image needs ?sequence=N, as an order does")
        image = await _body(request, MAX_IMAGE_BYTES)
        await self._conductor.put_image(request.path_params["vm_id"], int(text), image)
        return Response(status_code=204)

    async def _channel(self, websocket: WebSocket) -> None:
        with self._channels.taken(None):
            await relay(websocket, self._sp.channel_socket, NAME, CHANNEL_IDLE_S)

    async def _console(self, websocket: WebSocket) -> None:
        vm_id = websocket.path_params["vm_id"]
        with self._consoles.taken(vm_id):
            console = self._conductor.console(vm_id)
            await relay(websocket, console.path, "VM", CONSOLE_IDLE_S, console.pid)

    async def _link(self, websocket: WebSocket) -> None:
        name = websocket.query_params.get("handoff", "")
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            raise MessageError("a link needs ?handoff=ID, 32 hexadecimal digits")
        handoff = bytes.fromhex(name)
        opening = link_opening(handoff, self._revocation_list)
        with self._links.taken(None), self._conductor.link(websocket.path_params["vm_id"], handoff) as path:
            await relay(websocket, path, NAME, LINK_IDLE_S, opening=opening)


class _TokenGate:
    """Lets nobody in without the token.

    Args:
        app: behind it.
        token: what everybody must show.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        shown = HTTPConnection(scope).headers.get("authorization", "").encode("latin-1")
        if hmac.compare_digest(shown, self._expected):
            await self._app(scope, receive, send)
            return
        refusal = _problem(NoSuchToken("this agent does not know the token, or there was none"))
        refusal.headers["WWW-Authenticate"] = "Bearer"
        if scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(refusal)
        else:
            await refusal(scope, receive, send)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _problem(error: SpvtpmError, status: int | None = None) -> Response:
    problem = problem_of(error)
    if status is not None:
        problem = msgspec.structs.replace(problem, status=status)
    return Response(msgspec.json.encode(problem), status_code=problem.status, media_type=PROBLEM_TYPE)


async def _refuse(connection: HTTPConnection, error: Exception) -> Response:
    assert isinstance(error, SpvtpmError)  # noqa: S101  # registered for it
    log.info("refused %s: %s", connection.url.path, error)
    return await _answered(connection, _problem(error))


async def _refuse_http(connection: HTTPConnection, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # registered for it
    what = "there is nothing at this path" if error.status_code == 404 else error.detail
    told: SpvtpmError = NotFound(what) if error.status_code == 404 else MessageError(what)
    return await _answered(connection, _problem(told, error.status_code))


async def _confess(connection: HTTPConnection, error: Exception) -> Response:
    log.error("a defect: %s", connection.url.path, exc_info=error)
    return await _answered(connection, _problem(SpvtpmError(f"{type(error).__name__} in the agent; its log says more")))


async def _answered(connection: HTTPConnection, response: Response) -> Response:
    """The response; a WebSocket that is not open yet is denied with it."""
    if isinstance(connection, WebSocket):
        await connection.send_denial_response(response)
    return response


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body, if it is not too long and does not take too long.

    Raises:
        TooLarge: it is longer.
        Unavailable: it does not come.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise TooLarge(f"this is longer than {max_bytes} bytes")
    except TimeoutError:
        raise Unavailable("the request took too long to come") from None
    except ClientDisconnect:
        raise Unavailable("the request was cut off") from None
    return bytes(body)
