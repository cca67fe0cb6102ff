"""Looks at every host, again and again, writes down what has changed, and settles what migrations left. Every replica does.

What it writes of a VM holds only if no operation has begun since it began to look: the VM's sequence tells.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import Engine, Row, func, select, update
from sqlalchemy.exc import IntegrityError

from spvtpm.cloud import handoffs, operations, tables
from spvtpm.cloud.events import record_event
from spvtpm.cloud.observations import Observation, observe
from spvtpm.cloud.plans import SWEEPING
from spvtpm.cloud.settling import Settler
from spvtpm.wire.agent_api import HostReport, Order, VmReport
from spvtpm.wire.errors import MessageError, PolicyError, SpvtpmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from spvtpm.cloud.agents import Agent, Agents

TAKEN_AFTER_S: Final = 30.0
"""A VM whose owner has taken its vTPM, and has not told us for so long, is released by us: perhaps his terminal died."""

_MOST_VMS: Final = 65_536
_MAX_FAILURE: Final = 2048
_LOOKERS: Final = 32
_LOOK_S: Final = 3.0
"""Shorter than `hosts.ONLINE_WITHIN_S`: no host that answers is taken for one that is away because another does not."""

logger = logging.getLogger(__name__)


class Watch:
    """Looks at all hosts. `look` is called by one thread at a time."""

    def __init__(
        self, database: Engine, agents: Agents, submitted: Callable[[], None], *, taken_after_s: float = TAKEN_AFTER_S
    ) -> None:
        """
        Args:
            database: the platform's.
            agents: of all hosts.
            submitted: called after an operation was submitted here.
            taken_after_s: see `TAKEN_AFTER_S`.
        """
        self._database = database
        self._agents = agents
        self._submitted = submitted
        self._taken_after_s = taken_after_s
        self._taken: dict[uuid.UUID, float] = {}  # since when, monotonic
        self._looking: dict[str, Future[None]] = {}  # by the host's name, or the handoff's
        self._lookers = ThreadPoolExecutor(_LOOKERS, thread_name_prefix="watch")

    def close(self) -> None:
        """Ends."""
        self._lookers.shutdown(wait=True, cancel_futures=True)

    def look(self) -> None:
        """Looks at every host once. One that is slow is waited for a moment, and left out until it has answered."""
        with self._database.connect() as connection:
            rows = connection.execute(select(tables.hosts)).all()
        for row in rows:
            if row.name not in self._looking:
                self._looking[row.name] = self._lookers.submit(self._look_at, row)
        self._settle()
        done, _late = wait(self._looking.values(), timeout=_LOOK_S)
        for name in [name for name, looking in self._looking.items() if looking in done]:
            self._looking.pop(name).result()

    def _settle(self) -> None:
        """Settles the moves of VMs whose operations ended while a host was away."""
        with self._database.connect() as connection:
            left = handoffs.left_behind(connection)
        settler = Settler(self._database, self._agents)
        for handoff in left:
            key = f"handoff {handoff.operation}"
            if key not in self._looking:
                self._looking[key] = self._lookers.submit(settler.settle_left_behind, handoff)

    def _look_at(self, host: Row[Any]) -> None:
        with self._database.connect() as connection:
            vms = connection.execute(select(tables.vms).where(tables.vms.c.host == host.name)).all()
        agent = self._agents.agent(host.name, host.address, host.token)
        try:
            report = agent.host_report()
            reports = _all_reports(agent)
        except SpvtpmError as error:
            self._write_host(host, failure=str(error))
            return
        if host.chip_id is not None and report.chip_id != host.chip_id:
            failure = f"its secure processor is another one: {report.chip_id}, and {host.chip_id} before"
            self._write_host(host, failure=failure, seen_s=time.time())
            return
        try:
            self._write_host(host, failure="", seen_s=time.time(), report=report)
        except IntegrityError:
            failure = f"its secure processor {report.chip_id} is that of another host"
            self._write_host(host, failure=failure, seen_s=time.time())
            return
        for vm in vms:
            if vm.operation is None:
                self._write_vm(host.name, vm, reports.get(vm.vm_id))
        for stray in reports.keys() - {vm.vm_id for vm in vms}:
            self._sweep(agent, reports[stray])

    def _write_host(
        self, host: Row[Any], *, failure: str, seen_s: float | None = None, report: HostReport | None = None
    ) -> None:
        values: dict[str, Any] = {"failure": failure[:_MAX_FAILURE]}
        if seen_s is not None:
            values["seen_s"] = seen_s
        if report is not None:
            values |= {"chip_id": report.chip_id, "report": msgspec.to_builtins(report)}
        if failure != host.failure:
            logger.warning("host %s: %s", host.name, failure or "is back")
        with self._database.begin() as connection:
            # Its address may be another by now: then this is hearsay of what was there before.
            connection.execute(
                update(tables.hosts)
                .where(tables.hosts.c.name == host.name, tables.hosts.c.address == host.address)
                .values(values)
            )

    def _write_vm(self, host: str, vm: Row[Any], report: VmReport | None) -> None:
        if report is None:
            unknown = f"host {host} does not know the VM"
            seen = Observation("failed", unknown, vm.vtpm_id, "", vm.boots, is_taken=False)
        else:
            seen = observe(report, vm.state)
        columns = seen.columns()
        if columns["vtpm_id"] is None:
            del columns["vtpm_id"]  # its owner has it, and it is still the VM's
        if any(getattr(vm, name) != value for name, value in columns.items()):
            self._write_change(vm, seen, columns)
        if not seen.is_taken:
            self._taken.pop(vm.vm_id, None)
        elif time.monotonic() - self._taken.setdefault(vm.vm_id, time.monotonic()) >= self._taken_after_s:
            self._release(vm)

    def _write_change(self, vm: Row[Any], seen: Observation, columns: dict[str, Any]) -> None:
        with self._database.begin() as connection:
            changed = connection.execute(
                update(tables.vms)
                .where(
                    tables.vms.c.vm_id == vm.vm_id,
                    tables.vms.c.sequence == vm.sequence,
                    tables.vms.c.operation.is_(None),
                    tables.vms.c.state == vm.state,  # two replicas see one change; one event tells of it
                    tables.vms.c.boots == vm.boots,
                    tables.vms.c.host == vm.host,  # it may have moved, and this host have forgotten it since
                )
                .values(changed_s=time.time(), **columns)
            )
            if changed.rowcount != 1:
                return
            if seen.state != vm.state:
                why = f": {seen.failure}" if seen.failure else ""
                record_event(connection, vm.vm_id, seen.state, f"was {vm.state}{why}")
            elif seen.boots > vm.boots and seen.state == "running":
                record_event(connection, vm.vm_id, "rebooted", "its host began a new boot")

    def _release(self, vm: Row[Any]) -> None:
        del self._taken[vm.vm_id]
        try:
            with self._database.begin() as connection:
                operations.submit(
                    connection,
                    user=vm.user,
                    kind="release",
                    vm_id=vm.vm_id,
                    request_sha256=hashlib.sha256(b"the platform: taken").digest(),
                )
        except PolicyError as error:
            logger.info("VM %s is not released by itself: %s", vm.vm_id, error)
            return
        self._submitted()

    def _sweep(self, agent: Agent, report: VmReport) -> None:
        """Has a host forget a VM that was taken from it while it was away, if its secure processor has nothing of it."""
        if report.security_block is not None or report.want in {None, "absent"}:
            return
        with self._database.connect() as connection:
            vm = connection.execute(
                select(tables.vms.c.host, tables.vms.c.operation).where(tables.vms.c.vm_id == report.vm_id)
            ).one_or_none()
            if vm is not None and (vm.operation is not None or vm.host == agent.host):
                return
            if agent.host in handoffs.hosts_to_tell(connection, report.vm_id):
                return  # `_settle` has to tell it more
            # A number of the operation that the host heard of last, so anything newer is stronger.
            first = connection.scalar(
                select(func.max(tables.operations.c.sequence)).where(
                    tables.operations.c.vm_id == report.vm_id, tables.operations.c.sequence <= report.sequence
                )
            )
        if first is None:
            return  # no VM of ours
        try:
            agent.order(report.vm_id, Order(sequence=first + SWEEPING, want="absent"))
        except SpvtpmError as error:
            logger.info("host %s keeps VM %s: %s", agent.host, report.vm_id, error)


def _all_reports(agent: Agent) -> dict[uuid.UUID, VmReport]:
    reports: dict[uuid.UUID, VmReport] = {}
    for report in agent.vm_reports():
        if len(reports) >= _MOST_VMS:
            raise MessageError(f"the agent of host {agent.host} lists more than {_MOST_VMS} VMs")
        reports[report.vm_id] = report
    return reports
