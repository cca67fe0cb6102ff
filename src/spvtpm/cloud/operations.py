"""Operations as the database has them: begun once, one at a time for each VM, ended once. Whoever serves or works comes in.

Every function works within its caller's transaction. The row of an operation is the truth about it; the workflow engine
is told afterwards (`handed_over`), so that a death in between loses nothing.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from spvtpm.cloud import handoffs, tables
from spvtpm.cloud.events import record_event
from spvtpm.cloud.plans import ORDERS_PER_OPERATION, PLANS, verify_state
from spvtpm.wire.errors import AlreadyExists, NotFound, WrongState
from spvtpm.wire.platform_api import NewVm, Operation, OperationKind, Wants
from spvtpm.wire.platform_errors import Cancelled, IdempotencyMismatch, OperationUnderWay
from spvtpm.wire.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_DETAIL: Final = 2048  # agent_api.Sentence
_OPEN: Final = ("queued", "running")


def submit(
    connection: Connection,
    *,
    user: str,
    kind: OperationKind,
    vm_id: uuid.UUID,
    request_sha256: bytes,
    idempotency_key: str | None = None,
    new: NewVm | None = None,
    wants: Wants | None = None,
    destination: str | None = None,
) -> Operation:
    """Begins an operation, or finds the one that the same request began before.

    Args:
        connection: in a transaction, which the caller commits; then it wakes whoever hands over (`duties.Duties.wake`).
        user: whose VM it is.
        kind: what to do.
        vm_id: with which VM.
        request_sha256: 32 bytes; of all that was asked, method and path too.
        idempotency_key: by which the user knows the request again.
        new: the VM to create; for `create` alone.
        wants: which hosts will do from now on; for `place` alone, None: as before.
        destination: the host to move to; for `migrate` alone, None: whichever will do.

    Raises:
        NotFound: the user has no such VM.
        AlreadyExists: a VM of this id or name exists.
        WrongState: not with a VM in this state.
        OperationUnderWay: the VM has one that has not ended.
        IdempotencyMismatch: the key was used for another request.
    """
    # The lock comes first: of two requests with one key, the second then sees what the first has begun.
    vm = connection.execute(
        select(tables.vms).where(tables.vms.c.vm_id == vm_id, tables.vms.c.user == user).with_for_update()
    ).one_or_none()
    repeated = _begun_before(connection, user, idempotency_key, request_sha256)
    if repeated is not None:
        return repeated
    if new is not None:
        try:
            with connection.begin_nested():
                return _create(connection, user, new, idempotency_key, request_sha256)
        except IntegrityError:
            repeated = _begun_before(connection, user, idempotency_key, request_sha256)
            if repeated is not None:
                return repeated
            raise AlreadyExists(f"a VM named {new.name}, or one of this id, exists already") from None
    if vm is None:
        raise NotFound(f"there is no VM {vm_id} of yours")
    return _begin(connection, vm, kind, idempotency_key, request_sha256, wants, destination)


def _begun_before(connection: Connection, user: str, key: str | None, request_sha256: bytes) -> Operation | None:
    if key is None:
        return None
    row = connection.execute(
        select(tables.operations).where(tables.operations.c.user == user, tables.operations.c.idempotency_key == key)
    ).one_or_none()
    if row is None:
        return None
    if row.request_sha256 != request_sha256:
        raise IdempotencyMismatch("this idempotency key was used before, for another request")
    return operation_of(row)


def _create(connection: Connection, user: str, new: NewVm, key: str | None, request_sha256: bytes) -> Operation:
    # An id may be tried again after a failure; a host may still know the numbers of that.
    used = connection.scalar(
        select(func.max(tables.operations.c.sequence)).where(tables.operations.c.vm_id == new.vm_id)
    )
    first = 1 if used is None else used + ORDERS_PER_OPERATION
    operation_id, now_s = uuid.uuid4(), time.time()
    connection.execute(
        insert(tables.vms).values(
            vm_id=new.vm_id,
            user=user,
            name=new.name,
            state="placed",
            wants=msgspec.to_builtins(new.wants),
            sequence=first + ORDERS_PER_OPERATION - 1,
            operation=operation_id,
            vtpm="",
            boots=0,
            failure="",
            created_s=now_s,
            changed_s=now_s,
        )
    )
    return _insert(connection, operation_id, "create", user, new.vm_id, new.name, first, key, request_sha256, now_s)


def _begin(
    connection: Connection,
    vm: Row[Any],
    kind: OperationKind,
    key: str | None,
    request_sha256: bytes,
    wants: Wants | None,
    destination: str | None,
) -> Operation:
    if vm.operation is not None:
        raise OperationUnderWay(f"VM {vm.name} has an operation that has not ended")
    _verify_settled(connection, vm)
    verify_state(kind, vm.name, vm.state)
    operation_id, now_s = uuid.uuid4(), time.time()
    values: dict[str, Any] = {
        "operation": operation_id,
        "sequence": vm.sequence + ORDERS_PER_OPERATION,
        "changed_s": now_s,
    }
    if wants is not None:
        values["wants"] = msgspec.to_builtins(wants)
    changed = connection.execute(
        update(tables.vms)
        .where(
            tables.vms.c.vm_id == vm.vm_id,
            tables.vms.c.operation.is_(None),
            tables.vms.c.sequence == vm.sequence,
            tables.vms.c.state == vm.state,
        )
        .values(values)
    )
    if changed.rowcount != 1:
        raise OperationUnderWay(f"VM {vm.name} has an operation that has not ended")
    return _insert(
        connection,
        operation_id,
        kind,
        vm.user,
        vm.vm_id,
        vm.name,
        vm.sequence + 1,
        key,
        request_sha256,
        now_s,
        destination,
    )


def _verify_settled(connection: Connection, vm: Row[Any]) -> None:
    handoff = handoffs.undecided(connection, vm.vm_id)
    if handoff is not None:
        awaited = handoff.source if handoff.outcome == "open" else handoff.destination
        raise OperationUnderWay(
            f"VM {vm.name} was on its way from host {handoff.source} to host {handoff.destination} when that migration "
            f"ended: it is settled as soon as host {awaited} answers"
        )


def _insert(
    connection: Connection,
    operation_id: uuid.UUID,
    kind: OperationKind,
    user: str,
    vm_id: uuid.UUID,
    vm_name: str,
    sequence: int,
    key: str | None,
    request_sha256: bytes,
    now_s: float,
    destination: str | None = None,
) -> Operation:
    connection.execute(
        insert(tables.operations).values(
            operation_id=operation_id,
            user=user,
            kind=kind,
            vm_id=vm_id,
            vm_name=vm_name,
            sequence=sequence,
            state="queued",
            step="waiting",
            steps_done=0,
            steps=len(PLANS[kind].steps),
            idempotency_key=key,
            request_sha256=request_sha256,
            handed_over=False,
            destination=destination,
            created_s=now_s,
            changed_s=now_s,
        )
    )
    record_event(connection, vm_id, "asked", kind)
    return read(connection, operation_id)


def read(connection: Connection, operation_id: uuid.UUID) -> Operation:
    """An operation as its user sees it.

    Raises:
        NotFound: there is none of this id.
    """
    row = connection.execute(
        select(tables.operations).where(tables.operations.c.operation_id == operation_id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no operation {operation_id}")
    return operation_of(row)


def operation_of(row: Row[Any]) -> Operation:
    """A row of the table `operations` as its user sees it."""
    return Operation(
        operation_id=row.operation_id,
        kind=row.kind,
        vm_id=row.vm_id,
        vm_name=row.vm_name,
        state=row.state,
        step=row.step,
        steps_done=row.steps_done,
        steps=row.steps,
        error=None if row.error is None else msgspec.convert(row.error, Problem),
        created_s=row.created_s,
        changed_s=row.changed_s,
    )


def is_current(connection: Connection, operation_id: uuid.UUID) -> bool:
    """Whether the operation is the one under way at its VM; false for one that has ended."""
    found = connection.scalar(select(tables.vms.c.vm_id).where(tables.vms.c.operation == operation_id))
    return found is not None


def record_progress(connection: Connection, operation_id: uuid.UUID, *, step: str, steps_done: int) -> None:
    """Says what an operation does now; one that has ended says nothing any more.

    Args:
        connection: in a transaction.
        operation_id: the operation.
        step: in words.
        steps_done: how many are behind it.
    """
    _say(connection, operation_id, step=step[:_MAX_DETAIL], steps_done=steps_done)


def record_words(connection: Connection, operation_id: uuid.UUID, step: str) -> None:
    """Says more of a step that is under way, or that an operation is being undone. Arguments as of `record_progress`."""
    _say(connection, operation_id, step=step[:_MAX_DETAIL])


def _say(connection: Connection, operation_id: uuid.UUID, **values: str | int) -> None:
    connection.execute(
        update(tables.operations)
        .where(tables.operations.c.operation_id == operation_id, tables.operations.c.state.in_(_OPEN))
        .values(state="running", changed_s=time.time(), **values)
    )


def cancel(connection: Connection, user: str, operation_id: uuid.UUID) -> Operation:
    """Has a migration be given up; whoever runs it notices. If the VM has gone by then, the migration goes on to its end.

    Args:
        connection: in a transaction.
        user: whose operation it is.
        operation_id: the operation.

    Raises:
        NotFound: the user has begun none of this id.
        WrongState: it is of another kind, or it is too late.
    """
    row = connection.execute(
        select(tables.operations).where(
            tables.operations.c.operation_id == operation_id, tables.operations.c.user == user
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no operation {operation_id} of yours")
    if row.state not in _OPEN:
        raise WrongState(f"{row.kind} of VM {row.vm_name} has ended already: it is {row.state}")
    if row.kind != "migrate":
        raise WrongState(f"{row.kind} cannot be cancelled: only a migration can")
    handoff = handoffs.find(connection, operation_id)
    if handoff is not None and handoff.outcome == "gone":
        raise WrongState(f"VM {row.vm_name} has left host {handoff.source} already: its migration can only go on")
    connection.execute(
        update(tables.operations).where(tables.operations.c.operation_id == operation_id).values(is_cancelled=True)
    )
    return read(connection, operation_id)


def verify_wanted(connection: Connection, operation_id: uuid.UUID) -> None:
    """Whether an operation's user still wants it.

    Raises:
        Cancelled: he does not.
    """
    if connection.scalar(
        select(tables.operations.c.is_cancelled).where(tables.operations.c.operation_id == operation_id)
    ):
        raise Cancelled("its user cancelled it")


def end(connection: Connection, operation_id: uuid.UUID, problem: Problem | None) -> bool:
    """Ends an operation, if nobody has: done, or failed for a reason. Its VM is free for the next one.

    Returns:
        Whether it was this call that ended it.
    """
    connection.execute(  # first of the two, as everybody does who changes both
        update(tables.vms).where(tables.vms.c.operation == operation_id).values(operation=None, changed_s=time.time())
    )
    values: dict[str, Any] = {"state": "done", "step": "done", "steps_done": tables.operations.c.steps}
    if problem is not None:
        values = {"state": "failed", "step": "failed", "error": msgspec.to_builtins(problem)}
    changed = connection.execute(
        update(tables.operations)
        .where(tables.operations.c.operation_id == operation_id, tables.operations.c.state.in_(_OPEN))
        .values(changed_s=time.time(), **values)
    )
    return changed.rowcount == 1


def waiting_for_hand_over(connection: Connection, limit: int) -> Sequence[Row[uuid.UUID, str, str | None]]:
    """Operations that the workflow engine has not been told of, oldest first: `operation_id`, `kind`, `host` of each."""
    return connection.execute(
        select(tables.operations.c.operation_id, tables.operations.c.kind, tables.vms.c.host)
        .join(tables.vms, tables.vms.c.vm_id == tables.operations.c.vm_id, isouter=True)
        .where(tables.operations.c.handed_over.is_(False), tables.operations.c.state == "queued")
        .order_by(tables.operations.c.created_s)
        .limit(limit)
    ).all()


def mark_handed_over(connection: Connection, operation_id: uuid.UUID) -> None:
    """The workflow engine has the operation."""
    connection.execute(
        update(tables.operations).where(tables.operations.c.operation_id == operation_id).values(handed_over=True)
    )
