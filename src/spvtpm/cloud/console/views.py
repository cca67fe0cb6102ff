"""What each page shows: one look into the database, as its reader may see it. The console's routes come in.

Two looks that are equal look alike on the page, but for relative times: live pages are sent again when a look differs.
"""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

from spvtpm.cloud import queries
from spvtpm.cloud.console import numbers
from spvtpm.wire.errors import NotFound
from spvtpm.wire.platform_api import Event, Host, Operation, OperationPage, Token, Vm, VmPage

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from spvtpm.cloud.auth import Principal

_ON_OVERVIEW: Final = 8
_OPERATIONS_OF_VM: Final = 20
_OPEN: Final = frozenset({"queued", "running"})


class Paging(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A page's query string.

    Attributes:
        after: the last VM of the page before, as `queries.list_vms` has it.
        before: the last operation of the page before.
    """

    after: Annotated[str, Meta(max_length=127)] | None = None
    before: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be seen, and who wants to.

    Attributes:
        principal: who.
        path: parameters in the path, of the types of `routing.PATH_PARAMETERS`.
        paging: the query string.
    """

    principal: Principal
    path: dict[str, Any]
    paging: Paging


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A page's content.

    Attributes:
        title: of the page.
        announcement: what somebody who does not see the page is told when it changes.
        is_over: whether it will not change any more.
        is_busy: whether something is under way, so that a browser without scripts does well to come again soon.
    """

    title: str
    announcement: str
    is_over: bool = False
    is_busy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview(View):
    """The first page: what there is, and what needs somebody."""

    states: dict[str, int]
    under_way: list[Operation]
    recent: list[Operation]
    failed: list[Vm]
    hosts: list[Host]


def look_at_overview(connection: Connection, asked: Asked) -> Overview:
    """The overview."""
    user = asked.principal.sees
    found = queries.find_operations(connection, numbers.under_way(connection, user, _ON_OVERVIEW))
    under_way = sorted(found.values(), key=lambda operation: operation.created_s)
    failed = [queries.find_vm(connection, user, vm_id) for vm_id in numbers.failed_vms(connection, user, _ON_OVERVIEW)]
    return Overview(
        title="Overview",
        announcement=f"Operations under way: {len(under_way)}. VMs that need attention: {len(failed)}.",
        is_busy=bool(under_way),
        states=numbers.count_vms(connection, user),
        under_way=under_way,
        recent=queries.list_operations(connection, user, limit=_ON_OVERVIEW).operations,
        failed=failed,
        hosts=_hosts(connection, asked.principal),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts(View):
    """All hosts, and the secure processors in them."""

    hosts: list[Host]


def look_at_hosts(connection: Connection, asked: Asked) -> Hosts:
    """The hosts; where their agents listen is for administrators."""
    hosts = _hosts(connection, asked.principal)
    online = Counter(host.is_online for host in hosts)
    return Hosts(title="Hosts", announcement=f"Hosts online: {online[True]} of {len(hosts)}.", hosts=hosts)


def _hosts(connection: Connection, principal: Principal) -> list[Host]:
    hosts = queries.list_hosts(connection)
    if "admin" in principal.scopes:
        return hosts
    return [msgspec.structs.replace(host, address="", failure="") for host in hosts]  # a failure may name the address


@dataclass(frozen=True, slots=True, kw_only=True)
class Vms(View):
    """A page of VMs, with the operations that are under way on them."""

    page: VmPage
    operations: dict[uuid.UUID, Operation]
    next: str | None


def look_at_vms(connection: Connection, asked: Asked) -> Vms:
    """The VMs."""
    user = asked.principal.sees
    page = queries.list_vms(connection, user, after=asked.paging.after)
    operations = queries.find_operations(connection, {vm.operation for vm in page.vms if vm.operation is not None})
    last = page.vms[-1] if page.more else None
    return Vms(
        title="VMs",
        announcement=f"Operations under way: {len(operations)}.",
        is_busy=bool(operations),
        page=page,
        operations=operations,
        next=None if last is None else last.name if user is not None else f"{last.user}/{last.name}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OneVm(View):
    """A VM, and what happened to it."""

    vm: Vm
    operation: Operation | None
    events: list[Event]
    operations: list[Operation]


def look_at_vm(connection: Connection, asked: Asked) -> OneVm:
    """One VM.

    Raises:
        NotFound: the reader has none of this id.
    """
    user, vm_id = asked.principal.sees, asked.path["vm_id"]
    vm = queries.find_vm(connection, user, vm_id)
    found = {} if vm.operation is None else queries.find_operations(connection, {vm.operation})
    operation = next(iter(found.values()), None)
    return OneVm(
        title=f"VM {vm.name}",
        announcement=f"VM {vm.name}: {vm.state}." if operation is None else _announced(operation),
        is_busy=operation is not None,
        vm=vm,
        operation=operation,
        events=queries.newest_events(connection, user, vm_id),
        operations=queries.list_operations(connection, user, vm_id=vm_id, limit=_OPERATIONS_OF_VM).operations,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations(View):
    """A page of operations, newest first."""

    page: OperationPage
    next: uuid.UUID | None


def look_at_operations(connection: Connection, asked: Asked) -> Operations:
    """The operations.

    Raises:
        NotFound: the page is to follow one that is none of them.
    """
    page = queries.list_operations(connection, asked.principal.sees, before=asked.paging.before)
    is_open = Counter(operation.state in _OPEN for operation in page.operations)
    return Operations(
        title="Operations",
        announcement=f"Operations under way: {is_open[True]}.",
        is_busy=bool(is_open[True]),
        page=page,
        next=page.operations[-1].operation_id if page.more else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOperation(View):
    """An operation.

    Attributes:
        vm: its VM, if that is still there.
    """

    operation: Operation
    vm: Vm | None


def look_at_operation(connection: Connection, asked: Asked) -> OneOperation:
    """One operation.

    Raises:
        NotFound: the reader has begun none of this id.
    """
    operation = queries.find_operation(connection, asked.principal.sees, asked.path["operation_id"])
    try:
        vm = queries.find_vm(connection, asked.principal.sees, operation.vm_id)
    except NotFound:
        vm = None
    return OneOperation(
        title=f"{operation.kind} {operation.vm_name}: {operation.state}",
        announcement=_announced(operation),
        is_over=operation.state not in _OPEN,
        is_busy=operation.state in _OPEN,
        operation=operation,
        vm=vm,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(View):
    """The reader's own tokens, without what makes them tokens.

    Attributes:
        tokens: by age.
        current: the one that the session was begun with.
    """

    tokens: list[Token]
    current: uuid.UUID


def look_at_tokens(connection: Connection, asked: Asked) -> Tokens:
    """The reader's tokens; an administrator sees no other's here, either."""
    tokens = queries.find_user(connection, asked.principal.user).tokens
    return Tokens(
        title="Tokens",
        announcement=f"Tokens: {len(tokens)}.",
        tokens=tokens,
        current=asked.principal.token_id,
    )


def _announced(operation: Operation) -> str:
    what = f"{operation.kind} {operation.vm_name}"
    if operation.state not in _OPEN:
        return f"{what}: {operation.state}."
    return f"{what}: {operation.steps_done} of {operation.steps} steps done; {operation.step}."
