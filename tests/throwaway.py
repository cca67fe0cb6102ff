"""Throw-away processes for tests: libtpms is one TPM per process, and some tests mean to crash it."""

from __future__ import annotations

import functools
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ChildFailed(AssertionError):
    """The function raised in its process; the text is the child's traceback."""


class ChildDied(Exception):
    """The process ended without an answer.

    Attributes:
        status: the exit status, or minus the signal that killed it.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"the throw-away process ended with status {status}")
        self.status = status


def run_in_child(function: Callable[[], T], timeout_s: float = 60) -> T:
    """Calls the function in a fork of this process and gives its (picklable) result.

    Raises:
        ChildFailed: the function raised.
        ChildDied: the process crashed, or was killed because it took longer than `timeout_s`.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            with open(writer, "wb") as answer:  # noqa: PTH123 - a descriptor
                answer.write(_answer_of(function))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    answer_bytes = None
    try:
        answer_bytes = _read_all(reader, time.monotonic() + timeout_s)
    finally:
        os.close(reader)
        if answer_bytes is None:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not answer_bytes or status != 0:
        raise ChildDied(status)
    result, failure = pickle.loads(answer_bytes)  # noqa: S301 - our own child
    if failure is not None:
        raise ChildFailed(failure)
    return result  # type: ignore[no-any-return]


def in_throwaway_process(test: Callable[P, None]) -> Callable[P, None]:
    """Runs a test function (with its fixtures) by `run_in_child`."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_in_child(lambda: test(*args, **kwargs))

    return run


def _answer_of(function: Callable[[], T]) -> bytes:
    try:
        return pickle.dumps((function(), None))
    except BaseException:
        return pickle.dumps((None, traceback.format_exc()))


def _read_all(reader: int, deadline: float) -> bytes | None:
    """Everything until the writer is closed; None when that takes too long."""
    parts: list[bytes] = []
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reader, 65536)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None
