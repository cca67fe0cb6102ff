"""Waiting for the platform's operations: it tells by server-sent events; while it does not, it is asked.

Source: HTML Standard, section 9.2.6, for the events; only the fields `event` and `data` count here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import msgspec

from spvtpm.terminal.platform import Platform
from spvtpm.wire.decoding import UNDECODABLE, printable
from spvtpm.wire.errors import MessageError, SpvtpmError, error_from_code
from spvtpm.wire.platform_api import Operation
from spvtpm.wire.platform_errors import Unavailable

MAX_EVENT_BYTES: Final = 1 << 16

OPERATION_S: Final = 900.0
"""How long an operation is waited for; it goes on also if nobody waits."""

AWAY_S: Final = 120.0
"""How long a platform may say nothing meanwhile."""

_POLL_S: Final = 0.5

Tell = Callable[[Operation], None]
"""Told how far an operation is."""


def tell_nobody(_operation: Operation) -> None:
    """For those who do not watch."""


def wait_for(platform: Platform, operation: Operation, tell: Tell = tell_nobody, limit_s: float = OPERATION_S) -> None:
    """Waits until an operation is done.

    Args:
        platform: which does it.
        operation: as it was told last.
        tell: is told how far it is.
        limit_s: how long to wait.

    Raises:
        Unavailable: it has not ended in that time, or the platform is away.
        SpvtpmError: it failed; the class says why.
    """
    ended = wait_for_end(platform, operation, tell, limit_s)
    if ended.state == "failed":
        what = f"{ended.kind} of {ended.vm_name} has failed"
        if ended.error is None:
            raise MessageError(f"{what}, and the platform does not say why")
        raise error_from_code(ended.error.code, printable(f"{what}: {ended.error.detail}"))


def wait_for_end(
    platform: Platform, operation: Operation, tell: Tell = tell_nobody, limit_s: float = OPERATION_S
) -> Operation:
    """The same, whether it is done then or failed."""
    ends, heard = time.monotonic() + limit_s, time.monotonic()
    tell(operation)
    while not has_ended(operation):
        with suppress(SpvtpmError):  # whatever it is, the answer to a question will say so
            for told in _follow(platform, operation, ends):
                operation, heard = told, time.monotonic()
                tell(operation)
        if has_ended(operation):
            break
        try:
            operation, heard = _same(operation, platform.operation(operation.operation_id)), time.monotonic()
            tell(operation)
        except Unavailable:
            if time.monotonic() - heard > AWAY_S:
                raise
        if time.monotonic() > ends:
            what = f"{operation.kind} of {operation.vm_name}"
            raise Unavailable(f"{what} has not ended yet; it goes on, and the same command waits for it")
        if not has_ended(operation):
            time.sleep(_POLL_S)
    return operation


def has_ended(operation: Operation) -> bool:
    """Whether it is done or failed."""
    return operation.state in ("done", "failed")


def _follow(platform: Platform, operation: Operation, ends: float) -> Iterator[Operation]:
    """What is told of an operation, for as long as it is told."""
    with platform.stream(f"/v1/operations/{operation.operation_id}/events") as pieces:
        for data in _events(pieces, ends):
            try:
                told = msgspec.json.decode(data, type=Operation)
            except UNDECODABLE:
                raise MessageError("what the platform tells of an operation could not be understood") from None
            yield _same(operation, told)
            if has_ended(told):
                return


def _same(operation: Operation, told: Operation) -> Operation:
    if (told.operation_id, told.vm_id, told.kind) != (operation.operation_id, operation.vm_id, operation.kind):
        raise MessageError("the platform tells of another operation than was asked for")
    return told


def _events(pieces: Iterator[bytes], ends: float) -> Iterator[bytes]:
    """The data of each event `operation`."""
    event, data = b"", bytearray()
    for line in _lines(pieces, ends):
        field, _colon, value = line.partition(b":")
        if not line:
            if event == b"operation":
                yield bytes(data)
            event, data = b"", bytearray()
        elif field == b"event":
            event = value.removeprefix(b" ")
        elif field == b"data":
            data += value.removeprefix(b" ")
            if len(data) > MAX_EVENT_BYTES:
                raise MessageError("an event of the platform is too long")


def _lines(pieces: Iterator[bytes], ends: float) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        if time.monotonic() > ends:
            return
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise MessageError("an event of the platform is too long")
        for line in lines:
            yield line.removesuffix(b"\r")
