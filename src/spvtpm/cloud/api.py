"""The web application: every route of `wire/platform_api.py` over one `Platform`. The service comes in.

Whatever goes wrong is answered with problem details: what a route refuses, what no route is there for, and defects too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.routing import Route as HttpRoute

from spvtpm.cloud import auth, host_addresses, queries
from spvtpm.cloud.answers import json_answer, problem_answer
from spvtpm.cloud.console import build_console
from spvtpm.cloud.migrations import verify_migrated
from spvtpm.cloud.openapi import describe
from spvtpm.cloud.relay import Target, serve_relay
from spvtpm.cloud.routes import ROUTES
from spvtpm.cloud.routing import (
    IDEMPOTENCY_HEADER,
    Call,
    NoQuery,
    Route,
    digest,
    parse_body,
    parse_idempotency_key,
    parse_path,
    parse_query,
    read_body,
)
from spvtpm.cloud.shell import Shell
from spvtpm.cloud.streams import EventStream
from spvtpm.wire.errors import MessageError, NotFound, PeerError, SpvtpmError
from spvtpm.wire.platform_errors import NoSuchToken

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.websockets import WebSocket

    from spvtpm.cloud.auth import Principal
    from spvtpm.cloud.platform import Platform

_UPGRADE_REQUIRED: Final = 426


def build_app(platform: Platform) -> ASGIApp:
    """The application."""
    by_path: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        by_path.setdefault(route.path, {})[route.method] = route
    routes: list[BaseRoute] = [
        HttpRoute(path, _endpoint(platform, methods), methods=list(methods)) for path, methods in by_path.items()
    ]
    app = Starlette(
        routes=[*routes, *_streaming_routes(platform), *_open_routes(platform), *build_console(platform)],
        exception_handlers={SpvtpmError: _refused, HTTPException: _not_routed, ClientDisconnect: _left},
    )
    app.router.redirect_slashes = False
    app.router.default = _nothing_there
    return Shell(app)


def _endpoint(platform: Platform, methods: Mapping[str, Route]) -> Any:
    async def answer(request: Request) -> Response:
        route = methods["GET" if request.method == "HEAD" else request.method]
        return await _answer(platform, route, request)

    return answer


async def _answer(platform: Platform, route: Route, request: Request) -> Response:
    authorization = _authorization(request)
    body = await read_body(request, platform.config.limits.patience_s)

    def understood(connection: Connection) -> Call:
        principal = auth.authenticate(connection, authorization)
        principal.require(route.scope)
        keys = request.headers.getlist(IDEMPOTENCY_HEADER) if route.operates else []
        return Call(
            principal=principal,
            path=parse_path(request.path_params),
            query=parse_query(request.query_params.multi_items(), route.query),
            body=parse_body(body, request.headers.get("content-type"), route.body),
            idempotency_key=parse_idempotency_key(keys),
            request_sha256=digest(request.method, request.url.path, body),
            vms_per_user=platform.config.limits.vms_per_user,
        )

    if route.writes:
        call = await platform.read(understood)
        found = await platform.write(lambda connection: route.handle(connection, call))
    else:
        found = await platform.read(lambda connection: route.handle(connection, understood(connection)))
    if route.operates:
        platform.wake()
    return Response(status_code=route.status) if route.answer is None else json_answer(found, route.status)


def _authorization(request: Request) -> str:
    """Before anything of the body is taken."""
    header = request.headers.get("authorization")
    if header is None:
        raise NoSuchToken("the request has no token")
    return header


# Streams and relays


def _streaming_routes(platform: Platform) -> list[BaseRoute]:
    async def follow(request: Request) -> EventStream:
        authorization = _authorization(request)

        def look(connection: Connection) -> tuple[Principal, Any]:
            principal = auth.authenticate(connection, authorization)
            principal.require("read")
            parse_query(request.query_params.multi_items(), NoQuery)
            operation_id = parse_path(request.path_params)["operation_id"]
            return principal, queries.find_operation(connection, principal.sees, operation_id)

        principal, operation = await platform.read(look)
        return EventStream(platform.streams, principal.user, operation)

    async def channel(websocket: WebSocket) -> None:
        def find(connection: Connection, _: Principal) -> Target:
            chip_id = parse_path(websocket.path_params)["chip_id"]
            agent = host_addresses.agent_of_chip(connection, chip_id)
            return Target(agent, "/v1/channel", f"channel of chip {chip_id}")

        await serve_relay(platform, websocket, find)

    async def console(websocket: WebSocket) -> None:
        def find(connection: Connection, principal: Principal) -> Target:
            vm_id = parse_path(websocket.path_params)["vm_id"]
            agent = host_addresses.agent_of_vm(connection, principal.user, vm_id)
            return Target(agent, f"/v1/vms/{vm_id}/console", f"console of VM {vm_id}")

        await serve_relay(platform, websocket, find)

    async def upgrade(request: Request) -> Response:
        authorization = _authorization(request)
        (await platform.read(lambda connection: auth.authenticate(connection, authorization))).require("vms")
        parse_path(request.path_params)
        error = MessageError("this path is for WebSockets")
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}  # RFC 9110, section 15.5.22
        return problem_answer(error, status=_UPGRADE_REQUIRED, headers=headers)

    relays = (("/v1/chips/{chip_id}/channel", channel), ("/v1/vms/{vm_id}/console", console))
    return [
        HttpRoute("/v1/operations/{operation_id}/events", follow, methods=["GET"]),
        *(WebSocketRoute(path, endpoint) for path, endpoint in relays),
        *(HttpRoute(path, upgrade, methods=["GET"]) for path, _ in relays),
    ]


# Without a token


def _open_routes(platform: Platform) -> list[BaseRoute]:
    description = json_answer(describe())

    async def openapi(_: Request) -> Response:
        return description

    async def health(_: Request) -> Response:
        return json_answer({"status": "ok"})

    async def ready(_: Request) -> Response:
        await platform.read(verify_migrated)
        return json_answer({"status": "ok"})

    return [
        HttpRoute("/openapi.json", openapi, methods=["GET"]),
        HttpRoute("/healthz", health, methods=["GET"]),
        HttpRoute("/readyz", ready, methods=["GET"]),
    ]


# What goes wrong


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, SpvtpmError)  # noqa: S101  # as registered
    return problem_answer(error)


async def _not_routed(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # as registered
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return problem_answer(NotFound("there is nothing at this path"), headers=headers)
    return problem_answer(PeerError("this path has no such method"), status=error.status_code, headers=headers)


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _nothing_there(scope: Scope, receive: Receive, send: Send) -> None:
    await problem_answer(NotFound("there is nothing at this path"))(scope, receive, send)
