"""A view as HTML: the whole page, or the part of it that is sent again when it has changed. The console's routes come in.

Templates escape all that they are given, and contain neither scripts nor styles: the browser is told to take none from them.
"""

from __future__ import annotations

import hashlib
import shlex
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from spvtpm.cloud.console import views, words

if TYPE_CHECKING:
    from spvtpm.cloud.auth import Principal
    from spvtpm.cloud.console.views import View

SECURITY_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with `no-referrer` a form's `Origin` would be `null` (Fetch Standard, section 3.2)
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_FRAGMENTS: Final[dict[type[View], tuple[str, str]]] = {
    views.Overview: ("overview.html", "overview"),
    views.Hosts: ("hosts.html", "hosts"),
    views.Vms: ("vms.html", "vms"),
    views.OneVm: ("vm.html", "vms"),
    views.Operations: ("operations.html", "operations"),
    views.OneOperation: ("operation.html", "operations"),
    views.Tokens: ("tokens.html", "tokens"),
}
"""Template of each view, and the part of the console that it belongs to."""

_STATIC_TYPES: Final = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def render_page(view: View, principal: Principal, address: str) -> Response:
    """The whole page.

    Args:
        view: what it shows.
        principal: who reads it.
        address: of the platform, such as `https://cloud.example`.
    """
    content = render_fragment(view, principal, address)
    section = _FRAGMENTS[type(view)][1]
    return _html("page.html", view=view, principal=principal, section=section, content=content)


def render_fragment(view: View, principal: Principal, address: str) -> str:
    """What of the page changes; arguments as above."""
    template = _environment().get_template(_FRAGMENTS[type(view)][0])
    is_admin = "admin" in principal.scopes
    return template.render(view=view, principal=principal, is_admin=is_admin, address=address)


def render_login(*, wanted: str, error: str = "", status: int = 200) -> Response:
    """The page that asks for a token.

    Args:
        wanted: path to go on to.
        error: why the last attempt failed.
        status: of the answer.
    """
    return _html("login.html", status, wanted=wanted, error=error)


def render_error(title: str, detail: str, hint: str, status: int) -> Response:
    """A page for what went wrong."""
    return _html("error.html", status, title=title, detail=detail, hint=hint)


def static_file(name: str) -> Response | None:
    """A file that pages refer to; None: there is none of this name."""
    content_type = _STATIC_TYPES.get(name)
    if content_type is None:
        return None
    headers = SECURITY_HEADERS | {"Cache-Control": "public, max-age=31536000, immutable"}  # its address has its hash
    return Response(_static_bytes(name), headers=headers, media_type=content_type)


def _html(template: str, status: int = 200, **given: Any) -> Response:
    return HTMLResponse(_environment().get_template(template).render(**given), status, SECURITY_HEADERS)


@cache
def _static_bytes(name: str) -> bytes:
    return (resources.files("spvtpm.cloud.console") / "static" / name).read_bytes()


def _static_address(name: str) -> str:
    return f"/console/static/{name}?v={hashlib.sha256(_static_bytes(name)).hexdigest()[:16]}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("spvtpm.cloud.console"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "when": words.when,
        "end": words.end,
        "identity": words.identity,
        "duration": words.duration,
        "exactly": words.exactly,
        "by_number": words.by_number,
        "quoted": shlex.quote,
    }
    environment.tests["untouched"] = words.is_untouched
    environment.globals |= {
        "static": _static_address,
        "commands_for": words.commands_for,
        "vm_states": words.VM_STATES,
        "residencies": words.RESIDENCIES,
    }
    return environment
