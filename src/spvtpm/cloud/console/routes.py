"""The console's routes, under /console. The web application comes in.

    GET  /console/login          POST: a token for a session       POST /console/logout
    GET  /console/               overview
    GET  /console/hosts
    GET  /console/vms            ?after=NAME                        GET /console/vms/{vm_id}
    GET  /console/operations     ?before=ID                         GET /console/operations/{operation_id}
    GET  /console/tokens
    GET  /console/static/{file}

Each page answers `Accept: text/event-stream` with what is new on it (`live.py`).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, quote

from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router

from spvtpm.cloud import auth
from spvtpm.cloud.console import pages, sessions, views
from spvtpm.cloud.console.live import LivePage, have_it_reloaded
from spvtpm.cloud.console.throttle import WITHIN_S, Throttle
from spvtpm.cloud.places import Places
from spvtpm.cloud.routing import parse_path, parse_query, read_body
from spvtpm.cloud.streams import EVENT_STREAM_TYPE
from spvtpm.wire.errors import MessageError, NotFound, SpvtpmError, TooMany
from spvtpm.wire.platform_errors import NoSuchToken, Unavailable
from spvtpm.wire.problems import problem_of

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from spvtpm.cloud.auth import Principal
    from spvtpm.cloud.platform import Platform

ROOT: Final = "/console"
LOGIN: Final = f"{ROOT}/login"

_SEE_OTHER: Final = 303
_OWN_PATH: Final = re.compile(r"\A/console/[a-z0-9/-]{0,128}\Z")
_MAX_FIELDS: Final = 4
_THIS_MACHINE: Final = re.compile(r"\A(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?\Z")

_Handle = Callable[["Request"], Awaitable["ASGIApp"]]
_Look = Callable[["Connection", views.Asked], views.View]

_PAGES: Final[tuple[tuple[str, _Look], ...]] = (
    ("/", views.look_at_overview),
    ("/hosts", views.look_at_hosts),
    ("/vms", views.look_at_vms),
    ("/vms/{vm_id}", views.look_at_vm),
    ("/operations", views.look_at_operations),
    ("/operations/{operation_id}", views.look_at_operation),
    ("/tokens", views.look_at_tokens),
)


def build_console(platform: Platform) -> list[BaseRoute]:
    """The console's routes, for the application of this platform."""
    places = Places(platform.config.limits.streams_per_user, "live pages of this user")
    router = Router(
        [
            *(Route(path, _answering(_page(platform, places, look)), methods=["GET"]) for path, look in _PAGES),
            Route("/login", _answering(_ask_for_token(platform)), methods=["GET"]),
            Route("/login", _answering(_log_in(platform)), methods=["POST"]),
            Route("/logout", _answering(_log_out(platform)), methods=["POST"]),
            Route("/static/{file}", _answering(_static), methods=["GET"]),
        ],
        redirect_slashes=False,
        default=_nothing_there,
    )
    return [Route(ROOT, _answering(_to_overview), methods=["GET"]), Mount(ROOT, app=router)]


def _answering(handle: _Handle) -> Any:
    """An endpoint that answers errors with pages for people."""

    async def answer(request: Request) -> ASGIApp:
        try:
            return await handle(request)
        except SpvtpmError as error:
            if _wants_stream(request) and not isinstance(error, Unavailable):
                return have_it_reloaded()
            if isinstance(error, NoSuchToken):
                return _redirect(f"{LOGIN}?to={quote(request.scope['path'])}")
            problem = problem_of(error)
            return pages.render_error(problem.title, problem.detail, _hint(error), problem.status)

    return answer


def _hint(error: SpvtpmError) -> str:
    return "The list that led here may be out of date." if isinstance(error, NotFound) else error.hint


async def _nothing_there(scope: Scope, receive: Receive, send: Send) -> None:
    answer = pages.render_error("Not found", "there is nothing at this path", "", 404)
    await answer(scope, receive, send)


async def _to_overview(_: Request) -> Response:
    return _redirect(f"{ROOT}/")


async def _static(request: Request) -> Response:
    found = pages.static_file(request.path_params["file"])
    if found is None:
        raise NotFound("there is no such file")
    return found


# Pages


def _page(platform: Platform, places: Places, look: _Look) -> _Handle:
    async def answer(request: Request) -> ASGIApp:
        cookie = request.cookies.get(sessions.COOKIE)
        pairs = request.query_params.multi_items()
        address = _address(request)

        def see(connection: Connection) -> tuple[Principal, views.View]:
            principal = sessions.find(connection, cookie)
            asked = views.Asked(principal, parse_path(request.path_params), parse_query(pairs, views.Paging))
            return principal, look(connection, asked)

        principal, view = await platform.read(see)
        if not _wants_stream(request):
            return pages.render_page(view, principal, address)
        return LivePage(
            platform,
            places,
            principal.user,
            lambda connection: see(connection)[1],
            lambda newer: pages.render_fragment(newer, principal, address),
        )

    return answer


def _wants_stream(request: Request) -> bool:
    return request.headers.get("accept") == EVENT_STREAM_TYPE  # as EventSource asks


# Sessions


def _ask_for_token(platform: Platform) -> _Handle:
    async def answer(request: Request) -> Response:
        wanted = _own_path(request.query_params.get("to"))
        cookie = request.cookies.get(sessions.COOKIE)
        try:
            await platform.read(lambda connection: sessions.find(connection, cookie))
        except NoSuchToken:
            return pages.render_login(wanted=wanted)
        return _redirect(wanted)

    return answer


def _log_in(platform: Platform) -> _Handle:
    throttle = Throttle()

    async def answer(request: Request) -> Response:
        if not _is_same_origin(request):
            return _refuse_origin()
        client = _client(request)
        fields = await _read_form(request, platform)
        wanted, token = _own_path(fields.get("to")), fields.get("token", "").strip()
        try:
            throttle.attempt(*client)
            await platform.read(lambda connection: auth.principal_of(connection, token))  # before any lock is taken
            cookie = await platform.write(lambda connection: sessions.begin(connection, token))
        except TooMany as error:
            refused = pages.render_login(wanted=wanted, error=f"{error}: wait a little.", status=429)
            refused.headers["Retry-After"] = f"{WITHIN_S:.0f}"
            return refused
        except NoSuchToken:
            return pages.render_login(
                wanted=wanted, error="This is no token of this platform, or it has ended.", status=401
            )
        throttle.succeeded(*client)
        response = _redirect(wanted)
        _set_cookie(response, request, cookie, sessions.SESSION_S)
        return response

    return answer


def _log_out(platform: Platform) -> _Handle:
    async def answer(request: Request) -> Response:
        if not _is_same_origin(request):
            return _refuse_origin()
        cookie = request.cookies.get(sessions.COOKIE)
        await platform.write(lambda connection: sessions.end(connection, cookie))
        response = _redirect(LOGIN)
        _set_cookie(response, request, "", 0)
        return response

    return answer


def _set_cookie(response: Response, request: Request, value: str, age_s: int) -> None:
    response.set_cookie(
        sessions.COOKIE,
        value,
        max_age=age_s,
        path=ROOT,
        secure=request.headers.get("origin", "").startswith("https:"),  # as the browser has it
        httponly=True,
        samesite="strict",
    )


async def _read_form(request: Request, platform: Platform) -> dict[str, str]:
    """Fields of a form; hostile.

    Raises:
        MessageError: it is no form, or has too many fields.
    """
    body = await read_body(request, platform.config.limits.patience_s)
    try:
        return dict(parse_qsl(body.decode("ascii"), max_num_fields=_MAX_FIELDS, errors="strict"))
    except ValueError:  # of decoding, too
        raise MessageError("the form makes no sense") from None


def _is_same_origin(request: Request) -> bool:
    """Whether a form was sent from a page of this console; every browser says (Fetch Standard, section 3.2).

    The scheme is not compared: TLS may end at a proxy, and a browser tells what it sees as another site by itself.
    """
    site = request.headers.get("sec-fetch-site", "same-origin")  # not said where TLS is missing
    scheme, _, host = request.headers.get("origin", "").partition("://")
    return site == "same-origin" and scheme in {"http", "https"} and host == request.headers.get("host")


def _refuse_origin() -> Response:
    return pages.render_error(
        "Refused",
        "The form was not sent from a page of this console.",
        "Open the console anew. A proxy in between has to pass the header Host on.",
        403,
    )


def _client(request: Request) -> tuple[str, str]:
    """Who is throttled: the peer's address, and whom a proxy has named last, which anybody may make up."""
    peer = request.client.host if request.client is not None else ""
    forwarded = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    return peer, forwarded[:64]


def _address(request: Request) -> str:
    """What to type after `spvtpm login`: as terminals want it, with TLS unless it is this machine."""
    host = request.headers.get("host", "")
    scheme = request.scope["scheme"] if _THIS_MACHINE.match(host) else "https"
    return f"{scheme}://{host}"


def _own_path(wanted: str | None) -> str:
    """A path to go on to; hostile: it may lead nowhere but into the console."""
    return wanted if wanted is not None and _OWN_PATH.match(wanted) and wanted != LOGIN else f"{ROOT}/"


def _redirect(path: str) -> Response:
    return RedirectResponse(path, _SEE_OTHER, pages.SECURITY_HEADERS)
