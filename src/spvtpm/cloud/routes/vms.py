"""VMs: created, looked at, operated."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import Connection, func, select, update

from spvtpm.cloud import operations, queries, tables
from spvtpm.cloud.routing import Call, Route
from spvtpm.wire.errors import AlreadyExists, NotFound, SpvtpmError, TooMany, WrongState
from spvtpm.wire.platform_api import (
    Destination,
    EventPage,
    NewVm,
    Operation,
    OperationKind,
    PublishedPcrs,
    Vm,
    VmPage,
    Wants,
)
from spvtpm.wire.platform_errors import IdempotencyMismatch, OperationUnderWay

_OPERATING_ERRORS: Final[tuple[type[SpvtpmError], ...]] = (NotFound, WrongState, OperationUnderWay, IdempotencyMismatch)


class VmsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which VMs.

    Attributes:
        after: the last name of the page before; with `all`, `USER/NAME`.
        all: everybody's, for administrators.
    """

    after: Annotated[str, Meta(pattern=r"\A[a-z0-9-]{1,63}(/[a-z0-9-]{1,63})?\Z")] | UnsetType = UNSET
    all: Literal["true", "false"] = "false"


class EventsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which events: those after this one."""

    after: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)] = 0


def _create(connection: Connection, call: Call) -> Operation:
    new: NewVm = call.body
    operation = operations.submit(
        connection,
        user=call.principal.user,
        kind="create",
        vm_id=new.vm_id,
        request_sha256=call.request_sha256,
        idempotency_key=call.idempotency_key,
        new=new,
    )
    count = connection.scalar(select(func.count()).where(tables.vms.c.user == call.principal.user)) or 0
    if count > call.vms_per_user:  # which undoes it
        raise TooMany(f"a user may have {call.vms_per_user} VMs")
    return operation


def _operate(connection: Connection, call: Call, *, kind: OperationKind) -> Operation:
    wants: Wants | None = call.body
    return operations.submit(
        connection,
        user=call.principal.user,
        kind=kind,
        vm_id=call.path["vm_id"],
        request_sha256=call.request_sha256,
        idempotency_key=call.idempotency_key,
        wants=wants,
    )


def _migrate(connection: Connection, call: Call) -> Operation:
    where: Destination = call.body
    return operations.submit(
        connection,
        user=call.principal.user,
        kind="migrate",
        vm_id=call.path["vm_id"],
        request_sha256=call.request_sha256,
        idempotency_key=call.idempotency_key,
        destination=where.host,
    )


def _list(connection: Connection, call: Call) -> VmPage:
    query: VmsQuery = call.query
    user: str | None = call.principal.user
    if query.all == "true":
        call.principal.require("admin")
        user = None
    return queries.list_vms(connection, user, after=query.after or None)


def _show(connection: Connection, call: Call) -> Vm:
    return queries.find_vm(connection, call.principal.sees, call.path["vm_id"])


def _events(connection: Connection, call: Call) -> EventPage:
    query: EventsQuery = call.query
    return queries.list_events(connection, call.principal.sees, call.path["vm_id"], after=query.after)


def _publish_pcrs(connection: Connection, call: Call) -> None:
    pcrs: PublishedPcrs = call.body
    changed = connection.execute(
        update(tables.vms)
        .where(tables.vms.c.vm_id == call.path["vm_id"], tables.vms.c.user == call.principal.user)
        .values(pcrs=msgspec.to_builtins(pcrs), changed_s=time.time())
    )
    if changed.rowcount == 0:
        raise NotFound(f"there is no VM {call.path['vm_id']} of yours")


def _operation(
    method: str,
    path: str,
    kind: OperationKind,
    summary: str,
    *,
    body: type[Wants] | None = None,
) -> Route:
    return Route(
        method,
        path,
        "vms",
        summary,
        partial(_operate, kind=kind),
        writes=True,
        body=body,
        answer=Operation,
        status=202,
        operates=True,
        errors=_OPERATING_ERRORS,
    )


VMS: Final = (
    Route(
        "POST",
        "/v1/vms",
        "vms",
        "Place a new VM at a host; its owner provisions it then.",
        _create,
        writes=True,
        body=NewVm,
        answer=Operation,
        status=202,
        operates=True,
        errors=(AlreadyExists, IdempotencyMismatch, TooMany),
    ),
    Route("GET", "/v1/vms", "read", "VMs, by name.", _list, query=VmsQuery, answer=VmPage),
    Route("GET", "/v1/vms/{vm_id}", "read", "One VM.", _show, answer=Vm, errors=(NotFound,)),
    _operation("POST", "/v1/vms/{vm_id}/place", "place", "Place a VM again that is away.", body=Wants),
    _operation("POST", "/v1/vms/{vm_id}/start", "start", "Begin the VM's next boot."),
    _operation("POST", "/v1/vms/{vm_id}/shutdown", "shutdown", "Shut the VM down."),
    _operation("POST", "/v1/vms/{vm_id}/hibernate", "hibernate", "Hibernate the VM."),
    _operation("POST", "/v1/vms/{vm_id}/resume", "resume", "Go on where the VM was hibernated."),
    _operation("POST", "/v1/vms/{vm_id}/release", "release", "Its owner has the VM's vTPM: it needs no host any more."),
    Route(
        "POST",
        "/v1/vms/{vm_id}/migrate",
        "vms",
        "Move the VM to another host while it runs.",
        _migrate,
        writes=True,
        body=Destination,
        answer=Operation,
        status=202,
        operates=True,
        errors=_OPERATING_ERRORS,
    ),
    _operation("DELETE", "/v1/vms/{vm_id}", "destroy", "Its owner has destroyed the VM's vTPM: forget the VM."),
    Route(
        "GET",
        "/v1/vms/{vm_id}/events",
        "read",
        "What happened to a VM, oldest first.",
        _events,
        query=EventsQuery,
        answer=EventPage,
        errors=(NotFound,),
    ),
    Route(
        "PUT",
        "/v1/vms/{vm_id}/pcrs",
        "vms",
        "Show PCR values of a VM to whoever may look at it.",
        _publish_pcrs,
        writes=True,
        body=PublishedPcrs,
        status=204,
        errors=(NotFound,),
    ),
)
