"""Handoffs as the database has them: which VM moves from where to where, and what is known of how that ends.

A row is there before anything is ordered, and until both hosts have been told the end. It may outlive its operation: then
`watch.py` settles it. Every function works within its caller's transaction.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, update

from spvtpm.cloud import tables
from spvtpm.cloud.events import record_event

if TYPE_CHECKING:
    import uuid

    from spvtpm.wire.agent_api import HandoffReport

_table = tables.handoffs
_UNDECIDED = or_(_table.c.outcome == "open", (_table.c.outcome == "gone") & _table.c.receipt.is_(None))
"""Nobody knows yet at which of the two hosts the VM runs from now on, or it does not yet."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """A VM's move from one host to another.

    Attributes:
        operation: the migration.
        vm_id: the VM.
        sequence: the first of the numbers that orders may have.
        source: the host that it leaves.
        destination: the host that it goes to.
        handoff: the handoff's id at both; None: the source has told none yet, and the destination knows of nothing.
        outcome: what the source said last: `open`, `kept` or `gone`.
        token: of the source, for the destination.
        receipt: of the destination, for the source.
        failure: why the source kept it.
        is_told: whether both sides know the end.
    """

    operation: uuid.UUID
    vm_id: uuid.UUID
    sequence: int
    source: str
    destination: str
    handoff: str | None
    outcome: Literal["open", "kept", "gone"]
    token: str | None
    receipt: str | None
    failure: str
    is_told: bool

    @property
    def is_decided(self) -> bool:
        """Whether the VM is at one host from now on: kept by its source, or gone and going on at its destination."""
        return self.outcome == "kept" or self.receipt is not None

    @property
    def to_tell(self) -> tuple[str, ...]:
        """The hosts that could not know the end yet."""
        if not self.is_decided:
            return self.source, self.destination
        return (self.destination if self.outcome == "kept" else self.source,)


def begin(
    connection: Connection, operation: uuid.UUID, vm_id: uuid.UUID, sequence: int, source: str, destination: str
) -> None:
    """Writes down that a VM is going to move; arguments as of `Handoff`."""
    connection.execute(
        insert(_table).values(
            operation=operation,
            vm_id=vm_id,
            sequence=sequence,
            source=source,
            destination=destination,
            outcome="open",
            failure="",
            is_told=False,
            created_s=time.time(),
        )
    )


def find(connection: Connection, operation: uuid.UUID) -> Handoff | None:
    """The handoff of a migration, if there is one yet, or still."""
    row = connection.execute(select(_table).where(_table.c.operation == operation)).one_or_none()
    return None if row is None else _handoff_of(row)


def undecided(connection: Connection, vm_id: uuid.UUID) -> Handoff | None:
    """The handoff that has to be decided before anything else can begin on a VM."""
    row = connection.execute(select(_table).where(_table.c.vm_id == vm_id, _UNDECIDED)).first()
    return None if row is None else _handoff_of(row)


def left_behind(connection: Connection) -> list[Handoff]:
    """Handoffs whose operations are over."""
    under_way = select(tables.vms.c.vm_id).where(tables.vms.c.operation == _table.c.operation).exists()
    return [_handoff_of(row) for row in connection.execute(select(_table).where(~under_way))]


def hosts_to_tell(connection: Connection, vm_id: uuid.UUID) -> set[str]:
    """Hosts that have, or had, something of a VM, and have still to be told what became of it."""
    rows = connection.execute(select(_table).where(_table.c.vm_id == vm_id, _table.c.is_told.is_(False)))
    return {host for row in rows for host in _handoff_of(row).to_tell}


def coming(connection: Connection) -> Counter[str]:
    """How many VMs are on their way to each host that any is on its way to."""
    rows = connection.execute(
        select(_table.c.destination, func.count()).where(_UNDECIDED).group_by(_table.c.destination)
    )
    return Counter({str(host): count for host, count in rows})


def name(connection: Connection, operation: uuid.UUID, handoff: str) -> None:
    """The source has told the handoff's id: from now on the destination may know of it."""
    connection.execute(
        update(_table).where(_table.c.operation == operation, _table.c.handoff.is_(None)).values(handoff=handoff)
    )


def hear(connection: Connection, operation: uuid.UUID, report: HandoffReport) -> None:
    """The source has said what became of the handoff: `kept` or `gone`. It says so once; what comes after changes nothing."""
    _learn(connection, operation, report.outcome, report.failure, token=report.token)


def never_begun(connection: Connection, operation: uuid.UUID) -> None:
    """The source knows of no such handoff, and will not begin it any more: the VM stays."""
    _learn(connection, operation, "kept", "")


def _learn(connection: Connection, operation: uuid.UUID, outcome: str, failure: str, **values: str | None) -> None:
    connection.execute(
        update(_table)
        .where(_table.c.operation == operation, _table.c.outcome == "open")
        .values(outcome=outcome, failure=failure, **values)
    )


def arrive(connection: Connection, handoff: Handoff, receipt: str) -> None:
    """The destination has the VM: from now on it is that VM's host.

    Args:
        connection: in a transaction.
        handoff: which is gone from its source.
        receipt: of the destination.
    """
    vm = connection.execute(  # first of the two, as everybody does who changes both
        update(tables.vms)
        .where(tables.vms.c.vm_id == handoff.vm_id)
        .values(vm_id=handoff.vm_id)
        .returning(tables.vms.c.wants)
    ).one_or_none()
    changed = connection.execute(
        update(_table)
        .where(_table.c.operation == handoff.operation, _table.c.receipt.is_(None))
        .values(receipt=receipt)
    )
    if changed.rowcount != 1:
        return  # somebody else has written it down
    wants = vm.wants if vm is not None else {}
    if wants.get("host") is not None:  # its owner has named another one since
        wants = {**wants, "host": handoff.destination}
    connection.execute(
        update(tables.vms)
        .where(tables.vms.c.vm_id == handoff.vm_id)
        .values(host=handoff.destination, wants=wants, state="running", failure="", changed_s=time.time())
    )
    detail = f"from host {handoff.source} to host {handoff.destination}"
    record_event(connection, handoff.vm_id, "migrated", detail)


def mark_told(connection: Connection, operation: uuid.UUID) -> None:
    """Both sides know the end."""
    connection.execute(update(_table).where(_table.c.operation == operation).values(is_told=True))


def forget_told(connection: Connection, operation: uuid.UUID) -> None:
    """Forgets a handoff whose operation is over, if both sides know the end."""
    connection.execute(delete(_table).where(_table.c.operation == operation, _table.c.is_told))


def forget_host(connection: Connection, host: str) -> None:
    """Forgets the decided handoffs that are kept for this host alone, which will never be told any more."""
    connection.execute(
        delete(_table).where(
            ((_table.c.outcome == "kept") & (_table.c.destination == host))
            | (_table.c.receipt.is_not(None) & (_table.c.source == host))
        )
    )


def count_undecided(connection: Connection, host: str) -> int:
    """How many VMs are moving to a host, or from it."""
    concerned = or_(_table.c.source == host, _table.c.destination == host)
    return connection.scalar(select(func.count()).where(concerned, _UNDECIDED)) or 0


def _handoff_of(row: Row[Any]) -> Handoff:
    return Handoff(
        operation=row.operation,
        vm_id=row.vm_id,
        sequence=row.sequence,
        source=row.source,
        destination=row.destination,
        handoff=row.handoff,
        outcome=row.outcome,
        token=row.token,
        receipt=row.receipt,
        failure=row.failure,
        is_told=row.is_told,
    )
