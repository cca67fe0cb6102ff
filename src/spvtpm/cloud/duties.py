"""What each replica of the platform does besides answering: hands operations over, runs them, beats, looks at hosts.

Life: construct → `start()` → `wake()` after each submission was committed → `close()`.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from sqlalchemy import Engine, select

from spvtpm.cloud import operations, tables
from spvtpm.cloud.agents import Agents
from spvtpm.cloud.dbos_engine import DbosEngine
from spvtpm.cloud.replicas import BEAT_EVERY_S, Replicas
from spvtpm.cloud.watch import TAKEN_AFTER_S, Watch
from spvtpm.cloud.workflows import PATIENCE_S, Workflows

if TYPE_CHECKING:
    from collections.abc import Callable

    from spvtpm.cloud.durable import DurableEngine

LOOK_EVERY_S: Final = 3.0

_HAND_OVER_EVERY_S: Final = 1.0
_AT_ONCE: Final = 100
_NO_HOST_YET: Final = "placement"
_LOST_AFTER_S: Final = 60.0

logger = logging.getLogger(__name__)


class Duties:
    """The platform's background work, in threads of its own. A database that is away delays it, and does not end it."""

    def __init__(
        self,
        database: Engine,
        *,
        replica: str,
        patience_s: float = PATIENCE_S,
        look_every_s: float = LOOK_EVERY_S,
        taken_after_s: float = TAKEN_AFTER_S,
    ) -> None:
        """
        Args:
            database: the platform's, with its tables made.
            replica: this process' name among the replicas, at most 64 characters; the same after a restart, and no other's.
            patience_s: how long a step of an operation tries to reach a host.
            look_every_s: how often all hosts are looked at.
            taken_after_s: how long after its owner took its vTPM a VM is released, if nobody asks.
        """
        self._database = database
        self._leaving = threading.Event()
        self._awake = threading.Event()
        self._is_running = threading.Event()
        self._agents = Agents()
        self._workflows = Workflows(database, self._agents, self._leaving, patience_s=patience_s)
        self._engine: DurableEngine = DbosEngine(
            self._workflows.run, database_url=database.url.render_as_string(hide_password=False), replica=replica
        )
        self._replicas = Replicas(database, replica)
        self._watch = Watch(database, self._agents, self.wake, taken_after_s=taken_after_s)
        self._threads = [
            threading.Thread(target=self._repeat, args=(duty, every_s), name=f"duty-{name}", daemon=True)
            for name, duty, every_s in (
                ("hand-over", self._hand_over, _HAND_OVER_EVERY_S),
                ("beat", self._beat, BEAT_EVERY_S),
                ("watch", self._watch.look, look_every_s),
            )
        ]
        self._lost_looked_s = time.monotonic()

    def start(self) -> None:
        """Begins; returns at once."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Something was submitted, and committed. Without this it is found within a second."""
        self._awake.set()

    def close(self) -> None:
        """Ends. Operations stay as they are, for the next start or another replica."""
        self._leaving.set()
        self._awake.set()
        for thread in self._threads:
            thread.join()
        if self._is_running.is_set():
            self._engine.close()
        self._watch.close()
        self._agents.close()

    def _repeat(self, duty: Callable[[], None], every_s: float) -> None:
        waits_for = self._awake if duty == self._hand_over else self._leaving
        is_well = True
        while not self._leaving.is_set():
            try:
                duty()
                is_well = True
            except Exception as error:  # whatever it was: it is a duty
                if is_well:
                    logger.warning("%s: %s", threading.current_thread().name, type(error).__name__, exc_info=True)
                is_well = False
            waits_for.wait(every_s)

    def _hand_over(self) -> None:
        self._awake.clear()
        if not self._is_running.is_set():
            self._engine.start()
            self._is_running.set()
        with self._database.connect() as connection:
            waiting = operations.waiting_for_hand_over(connection, _AT_ONCE)
        for operation_id, kind, host in waiting:
            self._engine.hand_over(operation_id, _queue_key(kind, host))
            with self._database.begin() as connection:
                operations.mark_handed_over(connection, operation_id)
        if len(waiting) == _AT_ONCE:
            self._awake.set()
        if time.monotonic() - self._lost_looked_s > _LOST_AFTER_S:
            self._lost_looked_s = time.monotonic()
            self._end_abandoned()

    def _end_abandoned(self) -> None:
        with self._database.connect() as connection:
            quiet = connection.scalars(
                select(tables.operations.c.operation_id).where(
                    tables.operations.c.handed_over.is_(True),
                    tables.operations.c.state.in_(("queued", "running")),
                    tables.operations.c.changed_s < time.time() - _LOST_AFTER_S,
                )
            ).all()
        for operation_id in self._engine.abandoned(quiet):
            logger.error("operation %s was abandoned by the workflow engine; it is ended", operation_id)
            self._workflows.give_up(operation_id)

    def _beat(self) -> None:
        dead = self._replicas.beat()
        if not self._is_running.is_set():
            return
        for name in dead:
            count = self._engine.take_over(name)
            logger.warning("replica %s is dead; it had begun %d operations, which go on here", name, count)
            self._replicas.bury(name)


def _queue_key(kind: str, host: str | None) -> str:
    """Migrations take long: nothing else at the host waits behind them."""
    return f"{host}: migrations" if kind == "migrate" else host or _NO_HOST_YET
