"""Runs operations: parts that may be repeated, an undo, an end that happens once. Only the workflow engine comes in.

A migration that its user has cancelled fails at its next part or try; what undoes it may find that it has to go on.

Whoever works on an operation may be believed dead and be slow only. So each step looks first whether its operation is still
the VM's current one, and each order has the operation's numbers: an agent refuses those of an operation that is over, and
those of a doing that was undone. See docs/decisions/0014-durable-workflows-on-dbos.md and 0015.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from sqlalchemy import Engine, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from spvtpm.cloud import endings, operations, tables
from spvtpm.cloud.agents import AWAY
from spvtpm.cloud.durable import Leaving
from spvtpm.cloud.plans import PLANS
from spvtpm.cloud.steps import STEPS, UNDO
from spvtpm.cloud.undertakings import NotCurrent, Undertaking, WentThrough
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.problems import Problem, problem_of

if TYPE_CHECKING:
    import threading
    import uuid
    from collections.abc import Callable

    from spvtpm.cloud.agents import Agents
    from spvtpm.cloud.durable import Durably
    from spvtpm.cloud.plans import PlannedStep

PATIENCE_S: Final = 60.0
"""How long a step tries to reach a host."""

_MAX_DETAIL: Final = 2048  # problems.Problem
_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 1.0  # within which a cancellation is noticed
_DATABASE_AWAY: Final = (OperationalError, InterfaceError, NoConnectionFree)

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Of a part.

    Attributes:
        is_over: the operation is not under way any more: somebody else has ended it.
        is_done: what was to be undone could not be, and was done to its end.
        problem: why the part failed.
    """

    is_over: bool = False
    is_done: bool = False
    problem: Problem | None = None


class Workflows:
    """Runs operations, one in each thread that calls `run`."""

    def __init__(
        self, database: Engine, agents: Agents, leaving: threading.Event, *, patience_s: float = PATIENCE_S
    ) -> None:
        """
        Args:
            database: the platform's.
            agents: of all hosts.
            leaving: set when this process is being stopped.
            patience_s: how long a step tries to reach a host.
        """
        self._database = database
        self._agents = agents
        self._leaving = leaving
        self._patience_s = patience_s

    def run(self, operation_id: uuid.UUID, durably: Durably) -> None:
        """Runs an operation to its end; a `durable.RunOperation`.

        Raises:
            Leaving: this process is being stopped.
        """
        work = self._patiently(lambda: self._undertaking(operation_id))
        if work is None:
            return
        problem: Problem | None = None
        for number, step in enumerate(PLANS[work.kind].steps):
            answer = self._durably(durably, step.name, partial(self._do, work, step, number))
            if answer.is_over:
                return
            problem = answer.problem
            if problem is not None:
                undone = self._durably(durably, "undo", partial(self._undo, work, problem))
                if undone.is_over:
                    return
                problem = None if undone.is_done else undone.problem or problem
                break
        self._durably(durably, "end", partial(self._end, work, problem))

    def give_up(self, operation_id: uuid.UUID) -> None:
        """Ends an operation that nobody will run any more."""
        work = self._undertaking(operation_id)
        if work is not None:
            self._end(work, problem_of(SpvtpmError("the operation was lost on the way; see what the VM's state is")))

    def _undertaking(self, operation_id: uuid.UUID) -> Undertaking | None:
        with self._database.connect() as connection:
            row = connection.execute(
                select(tables.operations).where(tables.operations.c.operation_id == operation_id)
            ).one_or_none()
        if row is None or row.state in {"done", "failed"}:
            return None
        return Undertaking(operation_id, row.kind, row.vm_id, row.sequence, self._database, self._agents, self._leaving)

    def _durably(self, durably: Durably, name: str, part: Callable[[], _Answer]) -> _Answer:
        def answered() -> str:
            return msgspec.json.encode(self._patiently(part)).decode()

        return msgspec.json.decode(durably(name, answered), type=_Answer)

    def _do(self, work: Undertaking, step: PlannedStep, number: int) -> _Answer:
        def tell(waiting_for: str) -> None:
            words = f"{step.words}: {waiting_for}" if waiting_for else step.words
            with self._database.begin() as connection:
                operations.record_progress(connection, work.operation_id, step=words, steps_done=number)

        def act() -> None:
            with self._database.connect() as connection:
                operations.verify_wanted(connection, work.operation_id)
            STEPS[step.name](work)

        tell("")
        return self._attempted(act, self._patience_s, tell)

    def _undo(self, work: Undertaking, problem: Problem) -> _Answer:
        undo = UNDO.get(work.kind)
        if undo is None:
            return _Answer(problem=problem)
        work.say(f"undoing it: {problem.detail}")
        is_away = problem.code in {kind.code for kind in AWAY}
        answer = self._attempted(partial(undo, work), 0.0 if is_away else self._patience_s)
        if answer.problem is not None and not is_away:
            detail = f"{problem.detail}; and undoing it failed: {answer.problem.detail}"
            problem = msgspec.structs.replace(problem, detail=detail[:_MAX_DETAIL])
        return _Answer(is_over=answer.is_over, is_done=answer.is_done, problem=problem)

    def _end(self, work: Undertaking, problem: Problem | None) -> _Answer:
        return self._attempted(partial(endings.conclude, work, problem), self._patience_s)

    def _attempted(
        self, act: Callable[[], None], patience_s: float, tell: Callable[[str], None] = lambda _error: None
    ) -> _Answer:
        deadline, pause_s = time.monotonic() + patience_s, _FIRST_PAUSE_S
        while True:
            if self._leaving.is_set():
                raise Leaving
            try:
                act()
            except NotCurrent:
                return _Answer(is_over=True)
            except WentThrough:
                return _Answer(is_done=True)
            except AWAY as error:
                if time.monotonic() + pause_s > deadline:
                    sentence = f"{error}; what it did will be seen when it is back"
                    return _Answer(problem=problem_of(type(error)(sentence)))
                tell(str(error))
            except SpvtpmError as error:
                return _Answer(problem=problem_of(error))
            except _DATABASE_AWAY:
                raise
            except Exception:
                if self._leaving.is_set():  # connections are closed under it
                    raise Leaving from None
                logger.exception("a step of an operation broke")
                return _Answer(problem=problem_of(SpvtpmError("a step broke; the platform's log says how")))
            else:
                return _Answer()
            self._pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _patiently(self, part: Callable[[], _Result]) -> _Result:
        """Does a part, as often as the database is away meanwhile."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return part()
            except _DATABASE_AWAY as error:
                logger.warning("the database is away: %s", type(error).__name__)
            self._pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _pause(self, pause_s: float) -> None:
        if self._leaving.wait(pause_s):
            raise Leaving
