"""Empties a host: it takes no VMs any more, and those that run there move away, in their owners' names. Routes come in.

What does not run stays until its owner takes it: a vTPM moves with a running VM, or with its owner's keys, and the platform has
neither.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import Connection, Row, select, update

from spvtpm.cloud import operations, queries, tables
from spvtpm.wire.errors import PolicyError
from spvtpm.wire.platform_api import Drain, Host, Operation, Remaining, Wants
from spvtpm.wire.problems import Problem

if TYPE_CHECKING:
    from spvtpm.wire.platform_api import VmState

_FAILED_LATELY_S: Final = 60.0
"""A VM whose migration has failed so lately is not moved again at once: whoever asks until all is done comes to an end."""

_WHY: Final[dict[VmState, str]] = {
    "placed": "it does not run: its owner has to boot it, or to have its vTPM back by `spvtpm vm recover {name}`",
    "stopped": "it is off: its owner has to have its vTPM back by `spvtpm vm recover {name}`, or to boot it",
    "hibernated": "it is hibernated: its owner has to have its vTPM back by `spvtpm vm recover {name}`, or to resume it",
    "failed": "it failed: its owner has to have its vTPM back by `spvtpm vm recover {name}`, or to boot it again",
}


def drain(connection: Connection, name: str) -> Drain:
    """Has a host take no VMs any more, and begins to move away those that run there. Asked again, goes on with what is there.

    Args:
        connection: in a transaction, which the caller commits.
        name: of the host.

    Raises:
        NotFound: there is none of this name.
    """
    queries.find_host(connection, name)
    moving: list[Operation] = []
    remaining: list[Remaining] = []
    for vm in connection.execute(select(tables.vms).where(tables.vms.c.host == name).order_by(tables.vms.c.vm_id)):
        found = _away(connection, name, vm)
        if isinstance(found, Operation):
            moving.append(found)
        else:
            remaining.append(Remaining(vm_id=vm.vm_id, name=vm.name, user=vm.user, why=found))
    # Last, for whoever places a VM has that locked before the hosts.
    return Drain(host=_set_draining(connection, name, is_draining=True), moving=moving, remaining=remaining)


def end_drain(connection: Connection, name: str) -> Host:
    """Has a host take VMs again. What is moving away moves on.

    Raises:
        NotFound: there is none of this name.
    """
    return _set_draining(connection, name, is_draining=False)


def _set_draining(connection: Connection, name: str, *, is_draining: bool) -> Host:
    connection.execute(update(tables.hosts).where(tables.hosts.c.name == name).values(is_draining=is_draining))
    return queries.find_host(connection, name)


def _away(connection: Connection, host: str, vm: Row[Any]) -> Operation | str:
    """The migration that moves a VM away, or why there is none."""
    if vm.operation is not None:
        operation = operations.read(connection, vm.operation)
        return operation if operation.kind == "migrate" else f"it has another operation under way: {operation.kind}"
    if vm.state != "running":
        return _WHY[vm.state].format(name=vm.name)
    if msgspec.convert(vm.wants, Wants).host == host:
        return f"its owner wants it at host {host} alone"
    failure = _lately_failed(connection, vm)
    if failure:
        return failure
    try:
        return operations.submit(
            connection,
            user=vm.user,
            kind="migrate",
            vm_id=vm.vm_id,
            request_sha256=hashlib.sha256(f"the platform: drain host {host}".encode()).digest(),
        )
    except PolicyError as error:
        return str(error)


def _lately_failed(connection: Connection, vm: Row[Any]) -> str:
    last = connection.execute(
        select(tables.operations)
        .where(tables.operations.c.vm_id == vm.vm_id, tables.operations.c.kind == "migrate")
        .order_by(tables.operations.c.created_s.desc())
        .limit(1)
    ).one_or_none()
    if last is None or last.error is None or time.time() - last.changed_s > _FAILED_LATELY_S:
        return ""
    return f"its migration failed: {msgspec.convert(last.error, Problem).detail}"[:2048]
