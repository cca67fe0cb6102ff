"""What a route of the API is, and what a request must be to reach it: strict, bounded, typed. The routes' tables come in.

One table makes both the application (`api.py`) and its description (`openapi.py`), so that the two cannot differ.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from spvtpm.wire.agent_api import ChipId
from spvtpm.wire.decoding import UNDECODABLE, in_words
from spvtpm.wire.errors import MessageError, NotFound, SpvtpmError
from spvtpm.wire.platform_api import MAX_BODY_BYTES, Name, Scope
from spvtpm.wire.platform_errors import TooLarge

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from starlette.requests import Request

    from spvtpm.cloud.auth import Principal

JSON_TYPE: Final = "application/json"
IDEMPOTENCY_HEADER: Final = "Idempotency-Key"

IdempotencyKey = Annotated[str, Meta(pattern=r"\A[!-~]{1,64}\Z")]

PATH_PARAMETERS: Final[Mapping[str, Any]] = {
    "vm_id": uuid.UUID,
    "operation_id": uuid.UUID,
    "token_id": uuid.UUID,
    "chip_id": ChipId,
    "name": Name,
}
"""The type of each parameter that stands in a path."""

_UUID: Final = re.compile(r"\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_Body = TypeVar("_Body")


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A route without a query string."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was understood.

    Attributes:
        principal: who asks.
        path: parameters in the path, of the types of `PATH_PARAMETERS`.
        query: of the route's type.
        body: of the route's type; None: it has none.
        idempotency_key: of the request.
        request_sha256: 32 bytes; of all that is asked.
        vms_per_user: how many VMs a user may have.
    """

    principal: Principal
    path: Mapping[str, Any]
    query: Any
    body: Any
    idempotency_key: str | None
    request_sha256: bytes
    vms_per_user: int


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    Attributes:
        method: of HTTP.
        path: with parameters in braces.
        scope: that the token needs.
        summary: one sentence.
        handle: answers a call, in a transaction, in a thread.
        writes: whether it does more than look.
        query: the struct that the query string is.
        body: the type of the request's body.
        answer: the type of the answer; None: it has none.
        status: of the answer.
        operates: whether it begins an operation: it may have an idempotency key, and the workers are woken.
        errors: what can go wrong, beside what can with any route.
    """

    method: str
    path: str
    scope: Scope
    summary: str
    handle: Callable[[Connection, Call], Any]
    writes: bool = False
    query: type[msgspec.Struct] = NoQuery
    body: Any = None
    answer: Any = None
    status: int = 200
    operates: bool = False
    errors: tuple[type[SpvtpmError], ...] = field(default=())


def parse_path(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Parameters of a path; hostile.

    Raises:
        NotFound: one is not of its type, so there is nothing of this id.
    """
    try:
        return {name: _path_parameter(name, value) for name, value in parameters.items()}
    except UNDECODABLE:
        raise NotFound("there is nothing of this id") from None


def _path_parameter(name: str, value: str) -> Any:
    kind = PATH_PARAMETERS[name]
    if kind is uuid.UUID and not _UUID.match(value):
        raise msgspec.ValidationError("no UUID in its usual form")
    return msgspec.convert(value, kind)


def parse_query(pairs: list[tuple[str, str]], kind: type[_Body]) -> _Body:
    """A query string's pairs; hostile.

    Raises:
        MessageError: one is unknown, there twice, or out of bounds.
    """
    given = dict(pairs)
    if len(given) != len(pairs):
        raise MessageError("a parameter of the query is there twice")
    try:
        return msgspec.convert(given, kind, strict=False)
    except UNDECODABLE as error:
        raise MessageError(f"the query makes no sense: {in_words(error)}") from None


def parse_body(body: bytes, content_type: str | None, kind: Any) -> Any:
    """A request's body; hostile bytes.

    Args:
        body: at most `MAX_BODY_BYTES`.
        content_type: the header.
        kind: what it must be; None: nothing.

    Raises:
        MessageError: it is not that.
    """
    if kind is None:
        if body:
            raise MessageError("the request has a body, and none belongs there")
        return None
    if (content_type or "").partition(";")[0].strip().lower() != JSON_TYPE:
        raise MessageError(f"the request's body is not said to be {JSON_TYPE}")
    try:
        return msgspec.json.decode(body, type=kind)
    except UNDECODABLE as error:
        raise MessageError(f"the request's body makes no sense: {in_words(error)}") from None


def parse_idempotency_key(keys: list[str]) -> str | None:
    """The header `Idempotency-Key`, however often it is there.

    Raises:
        MessageError: more than once, or it is not as it must be.
    """
    if not keys:
        return None
    if len(keys) > 1:
        raise MessageError(f"the header {IDEMPOTENCY_HEADER} is there twice")
    try:
        return msgspec.convert(keys[0], IdempotencyKey)
    except UNDECODABLE:
        raise MessageError(f"the header {IDEMPOTENCY_HEADER} is not 1 to 64 visible characters") from None


def digest(method: str, path: str, body: bytes) -> bytes:
    """What tells a repeated request from another one with the same idempotency key."""
    asked = hashlib.sha256()
    for part in (method.encode(), path.encode(), body):
        asked.update(len(part).to_bytes(8, "big") + part)
    return asked.digest()


async def read_body(request: Request, patience_s: float) -> bytes:
    """A request's body.

    Raises:
        TooLarge: it is longer than `MAX_BODY_BYTES`; no more than that is taken.
        MessageError: it does not come in time.
    """
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > MAX_BODY_BYTES:
        raise TooLarge(f"the request's body is longer than {MAX_BODY_BYTES} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(patience_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise TooLarge(f"the request's body is longer than {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise MessageError(f"the request's body did not come within {patience_s:g} s") from None
    return bytes(body)
