"""What the API answers with: JSON, or problem details. Nothing of it is for a browser to keep, show or guess at."""

from __future__ import annotations

import logging
from typing import Any, Final

import msgspec
from starlette.responses import Response

from spvtpm.cloud.routing import JSON_TYPE
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.platform_errors import NoSuchToken, TooLarge, Unavailable
from spvtpm.wire.problems import PROBLEM_TYPE, Problem, problem_of

RETRY_AFTER_S: Final = 2

logger = logging.getLogger(__name__)


def json_answer(value: Any, status: int = 200) -> Response:
    """A struct, or a list of them."""
    return Response(msgspec.json.encode(value), status, media_type=JSON_TYPE)


def problem_answer(error: SpvtpmError, *, status: int | None = None, headers: dict[str, str] | None = None) -> Response:
    """An error, as its reader gets it.

    Args:
        error: what went wrong.
        status: another one than the error's own.
        headers: beside those that the error has by itself.
    """
    problem = problem_of(error)
    if status is not None:
        problem = msgspec.structs.replace(problem, status=status)
    return _answer(problem, _headers_of(error) | (headers or {}))


def defect_answer() -> Response:
    """For an exception that is none of ours: nothing of it leaves the house."""
    return _answer(problem_of(SpvtpmError("the platform has a defect; its log says more")), {})


def _headers_of(error: SpvtpmError) -> dict[str, str]:
    if isinstance(error, NoSuchToken):
        return {"WWW-Authenticate": 'Bearer realm="spvtpm"'}  # RFC 6750, section 3
    if isinstance(error, Unavailable):
        return {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(error, TooLarge):
        return {"Connection": "close"}  # the rest of the body is not waited for
    return {}


def _answer(problem: Problem, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(problem), problem.status, headers, PROBLEM_TYPE)
