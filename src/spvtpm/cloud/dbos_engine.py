"""The workflow engine: DBOS, behind the port of `durable.py`. Nothing else of the platform knows it.

DBOS is one for each process, and keeps its tables beside the platform's: in PostgreSQL a schema of the same database, for
SQLite a second file. Why it, and where its edges are: docs/decisions/0014-durable-workflows-on-dbos.md.
"""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Final

from dbos import DBOS, DBOSConfig, SetEnqueueOptions, SetWorkflowID
from dbos import DBOSPortableJSONSerializer as JsonSerializer
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spvtpm.cloud.durable import RunOperation

APPLICATION_VERSION: Final = "1"
"""Of an operation's parts and their order. What a release of another version had begun is not run, but ended as failed."""

_NAME: Final = "spvtpm"
_WORKFLOW: Final = "run-operation"
_QUEUE: Final = "operations"
_PENDING: Final = "PENDING"
_OPEN: Final = frozenset({_PENDING, "ENQUEUED", "DELAYED"})


def workflow_database(database_url: str) -> str:
    """Where DBOS keeps its tables, for a platform whose tables are at `database_url`."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        return url.set(database=f"{url.database}.workflows").render_as_string(hide_password=False)
    return url.render_as_string(hide_password=False)


class DbosEngine:
    """Runs operations; see `durable.DurableEngine`."""

    def __init__(
        self,
        run: RunOperation,
        *,
        database_url: str,
        replica: str,
        places: int = 8,
        poll_s: float = 0.2,
    ) -> None:
        """
        Args:
            run: runs an operation.
            database_url: of the platform's tables; SQLAlchemy's form.
            replica: this process' name among the replicas; the same after a restart.
            places: how many operations of one queue key this process runs at a time.
            poll_s: how often it looks for work.
        """
        self._run = run
        self._database_url = workflow_database(database_url)
        self._replica = replica
        self._places = places
        self._poll_s = poll_s
        self._workflow: Callable[[str], None] | None = None

    def start(self) -> None:
        logger = logging.getLogger("dbos")
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())  # else DBOS writes to the console by itself
        run = self._run

        @DBOS.workflow(name=_WORKFLOW, max_recovery_attempts=None)
        def run_operation(operation_id: str) -> None:
            run(uuid.UUID(operation_id), lambda name, part: DBOS.run_step({"name": name}, part))

        DBOS(
            config=DBOSConfig(
                name=_NAME,
                system_database_url=self._database_url,
                application_version=APPLICATION_VERSION,
                executor_id=self._replica,
                serializer=JsonSerializer(),  # its own choice is pickle: code for whoever can write to the database
                log_level="WARNING",
            )
        )
        try:
            DBOS.launch()
            DBOS.register_queue(_QUEUE, partition_worker_concurrency=self._places, polling_interval_sec=self._poll_s)
        except BaseException:
            DBOS.destroy(destroy_registry=True)
            raise
        self._workflow = run_operation

    def hand_over(self, operation_id: uuid.UUID, queue_key: str) -> None:
        if self._workflow is None:
            raise RuntimeError("not started")
        with SetWorkflowID(str(operation_id)), SetEnqueueOptions(queue_partition_key=queue_key):
            DBOS.enqueue_workflow(_QUEUE, self._workflow, str(operation_id))

    def take_over(self, replica: str) -> int:
        left = DBOS.list_workflows(
            name=_WORKFLOW, status=_PENDING, executor_id=replica, load_input=False, load_output=False
        )
        for workflow in left:
            DBOS.resume_workflow(workflow.workflow_id, queue_name=_QUEUE)
        return len(left)

    def abandoned(self, operation_ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        if not operation_ids:
            return set()
        known = DBOS.list_workflows(
            workflow_ids=[str(one) for one in operation_ids], load_input=False, load_output=False
        )
        ours = {None, APPLICATION_VERSION}
        waited_for = {one.workflow_id for one in known if one.status in _OPEN and one.app_version in ours}
        return {one for one in operation_ids if str(one) not in waited_for}

    def close(self) -> None:
        self._workflow = None
        DBOS.destroy(destroy_registry=True)
