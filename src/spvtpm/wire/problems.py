"""Errors over HTTP: problem details with the code, the sentence and the hint of the error tree.

Source: RFC 9457. The members `code` and `hint` are extensions of ours.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from spvtpm.wire.decoding import UNDECODABLE, printable
from spvtpm.wire.errors import (
    AlreadyExists,
    ChannelError,
    MessageError,
    NotFound,
    PeerError,
    PermissionRefused,
    PolicyError,
    ResourceError,
    SpvtpmError,
    TooMany,
    error_from_code,
)
from spvtpm.wire.platform_errors import NoSuchToken, ScopeMissing, TooLarge, Unavailable

PROBLEM_TYPE: Final = "application/problem+json"

MAX_PROBLEM_BYTES: Final = 16_384

_STATUS: Final[tuple[tuple[type[SpvtpmError], int], ...]] = (
    (NoSuchToken, 401),
    (ScopeMissing, 403),
    (PermissionRefused, 403),
    (NotFound, 404),
    (AlreadyExists, 409),
    (TooLarge, 413),
    (TooMany, 429),
    (PolicyError, 409),
    (ChannelError, 502),
    (PeerError, 400),
    (Unavailable, 503),
    (ResourceError, 503),
    (SpvtpmError, 500),
)
"""The first that fits counts. Source: RFC 9110, section 15."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as its reader gets it. Members that are not known are ignored (RFC 9457, section 3.2).

    Attributes:
        type: a URN of the code.
        title: the same for all errors of the code.
        status: of the HTTP response.
        detail: what is wrong, a sentence.
        code: of the error class (`errors.py`).
        hint: what the reader can do about it.
    """

    type: Annotated[str, Meta(max_length=128)]
    title: Annotated[str, Meta(max_length=128)]
    status: Annotated[int, Meta(ge=100, le=599)]
    detail: Annotated[str, Meta(max_length=2048)]
    code: Annotated[str, Meta(max_length=64)]
    hint: Annotated[str, Meta(max_length=512)]


def problem_of(error: SpvtpmError) -> Problem:
    """The error as it crosses the border."""
    code = error.code
    status = next(number for kind, number in _STATUS if isinstance(error, kind))
    return Problem(
        type=f"urn:spvtpm:error:{code}",
        title=code.replace("-", " ").capitalize(),
        status=status,
        detail=str(error)[:2048],
        code=code,
        hint=error.hint,
    )


def error_of(body: bytes, status: int) -> SpvtpmError:
    """The error that a response stands for; hostile bytes.

    Args:
        body: of the response.
        status: of the response.
    """
    try:
        problem = msgspec.json.decode(body[:MAX_PROBLEM_BYTES], type=Problem)
    except UNDECODABLE:
        return MessageError(f"the other side answered with status {status}, and no word that could be understood")
    return error_from_code(problem.code, printable(problem.detail))
