"""The API's description, OpenAPI 3.1, made of the same table as the application, and of the messages' own types.

Source: OpenAPI Specification 3.1.1; JSON Schema 2020-12.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from spvtpm.cloud.routes import ROUTES
from spvtpm.cloud.routing import IDEMPOTENCY_HEADER, JSON_TYPE, PATH_PARAMETERS, IdempotencyKey, NoQuery, Route
from spvtpm.cloud.streams import EVENT_STREAM_TYPE
from spvtpm.wire.errors import MessageError, NotFound, SpvtpmError, TooMany, WrongState
from spvtpm.wire.platform_api import Operation
from spvtpm.wire.platform_errors import NoSuchToken, NotMigrated, ScopeMissing, TooLarge, Unavailable
from spvtpm.wire.problems import PROBLEM_TYPE, Problem, problem_of

_REFERENCE: Final = "#/components/schemas/{name}"
_EVERYWHERE: Final = (MessageError, NoSuchToken, ScopeMissing, Unavailable)
_RELAY_ERRORS: Final = (*_EVERYWHERE, NotFound, WrongState, TooMany)
_TITLE: Final = "spvtpm cloud platform"
_VERSION: Final = "1"  # of the paths under /v1

_RELAYS: Final = (
    ("/v1/chips/{chip_id}/channel", "WebSocket: one binary message a frame of a confidential channel with the chip."),
    ("/v1/vms/{vm_id}/console", "WebSocket: one binary message a frame of a confidential channel with the VM."),
)


def describe() -> dict[str, Any]:
    """The whole description."""
    types = _Types()
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, types)
    paths["/v1/operations/{operation_id}/events"] = {"get": _stream(types)}
    for path, summary in _RELAYS:
        paths[path] = {"get": _relay(path, summary, types)}
    for path, summary, errors in (
        ("/healthz", "This replica answers.", ()),
        ("/readyz", "This replica answers, and has its database.", (Unavailable, NotMigrated)),
        ("/openapi.json", "This description.", ()),
    ):
        answer = {"200": {"description": "Yes.", "content": {JSON_TYPE: {"schema": {"type": "object"}}}}}
        paths[path] = {"get": {"summary": summary, "security": [], "responses": answer | _problems(errors, types)}}
    return {
        "openapi": "3.1.1",
        "info": {"title": _TITLE, "version": _VERSION, "description": "Errors are problem details (RFC 9457)."},
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": types.components(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


class _Types:
    """Types that were named so far, and their schemas at the end."""

    def __init__(self) -> None:
        self._wanted: dict[str, Any] = {}

    def schema(self, kind: Any) -> dict[str, Any]:
        """Refers to the type's schema, or gives it if it has no name."""
        (schema,), components = msgspec.json.schema_components([kind], ref_template=_REFERENCE)
        self._wanted.update(components)
        portable: dict[str, Any] = _portable(schema)
        return portable

    def components(self) -> dict[str, Any]:
        return {name: _portable(schema) for name, schema in sorted(self._wanted.items())}


def _portable(schema: Any) -> Any:
    """With patterns as ECMA 262 has them: its `^` and `$` are Python's `\\A` and `\\Z`."""
    if isinstance(schema, dict):
        return {
            key: value.replace("\\A", "^").replace("\\Z", "$")
            if key == "pattern" and isinstance(value, str)
            else _portable(value)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_portable(value) for value in schema]
    return schema


def _operation(route: Route, types: _Types) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": route.summary,
        "description": f"Needs the scope `{route.scope}`.",
        "parameters": [*_path_parameters(route.path, types), *_query_parameters(route.query, types)],
    }
    if route.operates:
        described["parameters"].append(
            {"name": IDEMPOTENCY_HEADER, "in": "header", "required": False, "schema": types.schema(IdempotencyKey)}
        )
    if route.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON_TYPE: {"schema": types.schema(route.body)}}}
    answer: dict[str, Any] = {"description": "Done." if route.status != 202 else "Begun."}
    if route.answer is not None:
        answer["content"] = {JSON_TYPE: {"schema": types.schema(route.answer)}}
    described["responses"] = {str(route.status): answer} | _problems(_errors(route), types)
    return described


def _errors(route: Route) -> Iterable[type[SpvtpmError]]:
    yield from _EVERYWHERE
    yield from route.errors
    yield TooLarge  # whoever sends more than is taken, needed or not
    if "{" in route.path:
        yield NotFound


def _stream(types: _Types) -> dict[str, Any]:
    return {
        "summary": "What an operation is now, then each change, until it has ended.",
        "description": "Server-sent events named `operation`, each with an Operation. Needs the scope `read`.",
        "parameters": _path_parameters("{operation_id}", types),
        "responses": {
            "200": {
                "description": "Events.",
                "content": {EVENT_STREAM_TYPE: {}},
                "x-event": types.schema(Operation),
            }
        }
        | _problems((*_EVERYWHERE, NotFound, TooMany), types),
    }


def _relay(path: str, summary: str, types: _Types) -> dict[str, Any]:
    return {
        "summary": summary,
        "description": "Needs the scope `vms`.",
        "parameters": _path_parameters(path, types),
        "responses": {
            "101": {"description": "The WebSocket is open."},
            "426": {"description": "The request asks for no WebSocket."} | _problem_content(types),
        }
        | _problems(_RELAY_ERRORS, types),
    }


def _path_parameters(path: str, types: _Types) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": types.schema(kind)}
        for name, kind in PATH_PARAMETERS.items()
        if f"{{{name}}}" in path
    ]


def _query_parameters(query: type[msgspec.Struct], types: _Types) -> list[dict[str, Any]]:
    if query is NoQuery:
        return []
    return [
        {"name": field.encode_name, "in": "query", "required": field.required, "schema": types.schema(field.type)}
        for field in msgspec.structs.fields(query)
    ]


def _problems(errors: Iterable[type[SpvtpmError]], types: _Types) -> dict[str, Any]:
    """The responses for these errors, by their status, with the codes that may come."""
    by_status: dict[int, set[str]] = {}
    for kind in errors:
        by_status.setdefault(problem_of(kind("")).status, set()).add(kind.code)
    return {
        str(status): {"description": f"Problem: {', '.join(f'`{code}`' for code in sorted(codes))}."}
        | _problem_content(types)
        for status, codes in sorted(by_status.items())
    }


def _problem_content(types: _Types) -> dict[str, Any]:
    return {"content": {PROBLEM_TYPE: {"schema": types.schema(Problem)}}}
