"""What the platform knows, as its users see it. Routes and console come in; every function reads in its caller's transaction.

Where a function takes `user`, a VM of somebody else is no VM at all; None stands for an administrator, who sees all.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Select, func, select, tuple_

from spvtpm.cloud.hosts import is_online, report_of
from spvtpm.cloud.operations import operation_of
from spvtpm.cloud.tables import events, hosts, images, operations, tokens, users, vms
from spvtpm.wire.errors import NotFound
from spvtpm.wire.platform_api import (
    PAGE_EVENTS,
    PAGE_OPERATIONS,
    PAGE_VMS,
    Chip,
    Event,
    EventPage,
    Host,
    Operation,
    OperationPage,
    PublishedPcrs,
    Token,
    User,
    Vm,
    VmPage,
    Wants,
)

_VMS_OF_HOST = select(func.count()).where(vms.c.host == hosts.c.name).scalar_subquery()
_HAS_IMAGE = select(images.c.vm_id).where(images.c.vm_id == vms.c.vm_id).exists()


# VMs


def list_vms(connection: Connection, user: str | None, *, after: str | None = None, limit: int = PAGE_VMS) -> VmPage:
    """A page of a user's VMs by name; of all users' by user and name.

    Args:
        connection: to the database.
        user: whose; None: everybody's.
        after: the last one of the page before: its name, or of everybody's `USER/NAME`.
        limit: how many.
    """
    query = _select_vms(user).order_by(vms.c.user, vms.c.name).limit(limit + 1)
    if after is not None and user is not None:
        query = query.where(vms.c.name > after)
    elif after is not None:
        whose, _, name = after.partition("/")
        query = query.where(tuple_(vms.c.user, vms.c.name) > tuple_(whose, name))
    rows = connection.execute(query).all()
    return VmPage(vms=[_vm(row) for row in rows[:limit]], more=len(rows) > limit)


def find_vm(connection: Connection, user: str | None, vm_id: uuid.UUID) -> Vm:
    """One VM.

    Raises:
        NotFound: the user has none of this id.
    """
    row = connection.execute(_select_vms(user).where(vms.c.vm_id == vm_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no VM {vm_id} of yours")
    return _vm(row)


def _select_vms(user: str | None) -> Select[Any]:
    query = select(vms, hosts.c.chip_id, _HAS_IMAGE.label("has_image")).outerjoin(hosts, hosts.c.name == vms.c.host)
    return query if user is None else query.where(vms.c.user == user)


def _vm(row: Row[Any]) -> Vm:
    return Vm(
        vm_id=row.vm_id,
        name=row.name,
        user=row.user,
        state=row.state,
        host=row.host,
        chip_id=row.chip_id,
        vtpm_id=row.vtpm_id,
        vtpm=row.vtpm,
        boots=row.boots,
        has_image=bool(row.has_image),
        operation=row.operation,
        failure=row.failure,
        wants=msgspec.convert(row.wants, Wants),
        pcrs=None if row.pcrs is None else msgspec.convert(row.pcrs, PublishedPcrs),
        created_s=row.created_s,
        changed_s=row.changed_s,
    )


# Events


def list_events(
    connection: Connection, user: str | None, vm_id: uuid.UUID, *, after: int = 0, limit: int = PAGE_EVENTS
) -> EventPage:
    """A page of a VM's events, oldest first.

    Args:
        connection: to the database.
        user: whose VM; None: anybody's.
        vm_id: the VM.
        after: number of the last one of the page before.
        limit: how many.

    Raises:
        NotFound: the user has no such VM.
    """
    query = _select_events(connection, user, vm_id).where(events.c.number > after)
    rows = connection.execute(query.order_by(events.c.number).limit(limit + 1)).all()
    return EventPage(events=[_event(row) for row in rows[:limit]], more=len(rows) > limit)


def newest_events(
    connection: Connection, user: str | None, vm_id: uuid.UUID, *, limit: int = PAGE_EVENTS
) -> list[Event]:
    """A VM's last events, newest first.

    Raises:
        NotFound: the user has no such VM.
    """
    query = _select_events(connection, user, vm_id).order_by(events.c.number.desc()).limit(limit)
    return [_event(row) for row in connection.execute(query)]


def _select_events(connection: Connection, user: str | None, vm_id: uuid.UUID) -> Select[Any]:
    """Those since the VM was created: an id may have been another user's before."""
    vm = find_vm(connection, user, vm_id)
    return select(events).where(events.c.vm_id == vm_id, events.c.time_s >= vm.created_s)


def _event(row: Row[Any]) -> Event:
    return Event(number=row.number, time_s=row.time_s, what=row.what, detail=row.detail)


# Operations


def list_operations(
    connection: Connection,
    user: str | None,
    *,
    vm_id: uuid.UUID | None = None,
    before: uuid.UUID | None = None,
    limit: int = PAGE_OPERATIONS,
) -> OperationPage:
    """A page of operations, newest first.

    Args:
        connection: to the database.
        user: whose; None: everybody's.
        vm_id: of this VM alone, which may be gone.
        before: id of the last one of the page before.
        limit: how many.

    Raises:
        NotFound: `before` is none of them.
    """
    key = (operations.c.created_s, operations.c.operation_id)
    query = _select_operations(user).order_by(*(column.desc() for column in key)).limit(limit + 1)
    if vm_id is not None:
        query = query.where(operations.c.vm_id == vm_id)
    if before is not None:
        last = _one_operation(connection, user, before)
        query = query.where(
            (operations.c.created_s < last.created_s)
            | ((operations.c.created_s == last.created_s) & (operations.c.operation_id < before))
        )
    rows = connection.execute(query).all()
    return OperationPage(operations=[operation_of(row) for row in rows[:limit]], more=len(rows) > limit)


def find_operation(connection: Connection, user: str | None, operation_id: uuid.UUID) -> Operation:
    """One operation.

    Raises:
        NotFound: the user has begun none of this id.
    """
    return operation_of(_one_operation(connection, user, operation_id))


def find_operations(connection: Connection, operation_ids: set[uuid.UUID]) -> dict[uuid.UUID, Operation]:
    """Those of the operations that there are, whoever began them."""
    query = select(operations).where(operations.c.operation_id.in_(operation_ids))
    return {row.operation_id: operation_of(row) for row in connection.execute(query)}


def _select_operations(user: str | None) -> Select[Any]:
    query = select(operations)
    return query if user is None else query.where(operations.c.user == user)


def _one_operation(connection: Connection, user: str | None, operation_id: uuid.UUID) -> Row[Any]:
    row = connection.execute(_select_operations(user).where(operations.c.operation_id == operation_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no operation {operation_id} of yours")
    return row


# Hosts and their chips


def list_chips(connection: Connection) -> list[Chip]:
    """All chips by id, whose hosts have shown them."""
    query = _select_hosts().where(hosts.c.chip_id.is_not(None), hosts.c.report.is_not(None)).order_by(hosts.c.chip_id)
    return [_chip(row) for row in connection.execute(query)]


def find_chip(connection: Connection, chip_id: str) -> Chip:
    """One chip.

    Raises:
        NotFound: no host has it.
    """
    row = connection.execute(
        _select_hosts().where(hosts.c.chip_id == chip_id, hosts.c.report.is_not(None))
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no chip {chip_id}")
    return _chip(row)


def list_hosts(connection: Connection) -> list[Host]:
    """All hosts by name."""
    return [_host(row) for row in connection.execute(_select_hosts().order_by(hosts.c.name))]


def find_host(connection: Connection, name: str) -> Host:
    """One host.

    Raises:
        NotFound: there is none of this name.
    """
    row = connection.execute(_select_hosts().where(hosts.c.name == name)).one_or_none()
    if row is None:
        raise NotFound(f"there is no host {name}")
    return _host(row)


def _select_hosts() -> Select[Any]:
    return select(hosts, _VMS_OF_HOST.label("vms"))


def _chip(row: Row[Any]) -> Chip:
    report = report_of(row)
    assert report is not None  # noqa: S101  # as it was selected
    return Chip(
        chip_id=row.chip_id,
        host=row.name,
        is_online=is_online(row, time.time()),
        firmware=report.firmware,
        software=report.software,
        vms=row.vms,
        max_vms=report.max_vms,
        papers=report.papers,
    )


def _host(row: Row[Any]) -> Host:
    report = report_of(row)
    return Host(
        name=row.name,
        address=row.address,
        is_online=is_online(row, time.time()),
        seen_s=row.seen_s,
        chip_id=row.chip_id,
        firmware=report.firmware if report is not None else 0,
        software=report.software if report is not None else "",
        vms=row.vms,
        max_vms=report.max_vms if report is not None else 0,
        missing_protection=report.missing_protection if report is not None else [],
        failure=row.failure,
        is_draining=row.is_draining,
    )


# Users


def list_users(connection: Connection) -> list[User]:
    """All users by name, and their tokens by age."""
    of_user: dict[str, list[Token]] = {}
    for row in connection.execute(select(tokens).order_by(tokens.c.created_s, tokens.c.token_id)):
        of_user.setdefault(row.user, []).append(token_of(row))
    return [
        User(name=row.name, tokens=of_user.get(row.name, []), created_s=row.created_s)
        for row in connection.execute(select(users).order_by(users.c.name))
    ]


def find_user(connection: Connection, name: str) -> User:
    """One user.

    Raises:
        NotFound: there is none of this name.
    """
    row = connection.execute(select(users).where(users.c.name == name)).one_or_none()
    if row is None:
        raise NotFound(f"there is no user {name}")
    query = select(tokens).where(tokens.c.user == name).order_by(tokens.c.created_s, tokens.c.token_id)
    return User(name=name, tokens=[token_of(one) for one in connection.execute(query)], created_s=row.created_s)


def token_of(row: Row[Any]) -> Token:
    """A row of the table `tokens`, without what makes it one."""
    return Token(
        token_id=row.token_id,
        note=row.note,
        scopes=row.scopes,
        created_s=row.created_s,
        expires_s=row.expires_s,
    )
