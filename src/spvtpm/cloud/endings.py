"""How an operation ends: its row, its VM and the event change together, once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, update

from spvtpm.cloud import handoffs, operations, tables
from spvtpm.cloud.events import record_event
from spvtpm.cloud.observations import observe
from spvtpm.cloud.plans import PLANS
from spvtpm.wire.errors import SpvtpmError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from spvtpm.cloud.undertakings import Undertaking
    from spvtpm.wire.agent_api import VmReport
    from spvtpm.wire.platform_api import OperationKind, VmState
    from spvtpm.wire.problems import Problem

_LEADS_TO: Final[dict[OperationKind, VmState]] = {
    "create": "placed",
    "place": "placed",
    "start": "running",
    "shutdown": "stopped",
    "hibernate": "hibernated",
    "resume": "running",
    "migrate": "running",
    "release": "away",
    "destroy": "away",
}
_AWAY: Final[dict[str, Any]] = {"state": "away", "host": None, "vtpm": "", "failure": ""}

logger = logging.getLogger(__name__)


def conclude(work: Undertaking, problem: Problem | None) -> None:
    """Ends an operation.

    Args:
        work: the operation.
        problem: why it failed; None: it is done.

    Raises:
        NotCurrent: somebody else has ended it.
    """
    report = _last_report(work)
    with work.database.begin() as connection:
        vm = work.locked_vm(connection)
        operations.end(connection, work.operation_id, problem)
        if work.kind == "migrate":
            handoffs.forget_told(connection, work.operation_id)
        if problem is None and work.kind != "migrate":  # which was written down as the VM came
            record_event(connection, work.vm_id, PLANS[work.kind].event, _detail(work.kind, vm.host))
        elif problem is not None:
            record_event(connection, work.vm_id, "failed", f"{work.kind}: {problem.detail}")
        is_done = problem is None
        if (work.kind, is_done) in {("destroy", True), ("create", False)}:
            _remove(connection, work)
            return
        values = _outcome(work.kind, is_done, report, vm.state)
        if values:
            connection.execute(update(tables.vms).where(tables.vms.c.vm_id == work.vm_id).values(values))
        if is_done and work.kind in {"start", "resume"}:  # what it slept with is in its memory again, or void
            connection.execute(delete(tables.images).where(tables.images.c.vm_id == work.vm_id))


def _outcome(kind: OperationKind, is_done: bool, report: VmReport | None, state: VmState) -> dict[str, Any]:
    if (kind, is_done) in {("release", True), ("place", False)}:
        return _AWAY
    if is_done:
        state = _LEADS_TO[kind]
    if report is None:
        return {"state": state, "failure": ""} if is_done else {}
    return observe(report, state).columns()


def _detail(kind: OperationKind, host: str | None) -> str:
    return f"on host {host}" if host is not None and kind in {"create", "place", "start", "resume"} else ""


def _last_report(work: Undertaking) -> VmReport | None:
    agent = work.agent()
    if agent is None:
        return None
    try:
        return agent.vm_report(work.vm_id)
    except SpvtpmError as error:
        logger.info("operation %s ends without a report of its VM: %s", work.operation_id, error)
        return None


def _remove(connection: Connection, work: Undertaking) -> None:
    connection.execute(delete(tables.images).where(tables.images.c.vm_id == work.vm_id))
    connection.execute(delete(tables.vms).where(tables.vms.c.vm_id == work.vm_id))
