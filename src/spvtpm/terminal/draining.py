"""A host is emptied, as its platform's administrator wishes: all operations that move VMs away from there, to their ends.

It is the administrator's own platform: what it says counts. What became of a VM, its owner hears from secure processors.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from spvtpm.terminal.operations import wait_for_end
from spvtpm.terminal.platform import Platform
from spvtpm.wire.platform_api import Drain, Operation, Vm
from spvtpm.wire.platform_errors import Unavailable

Ends = Callable[[int, int, Operation], None]
"""Told how many operations have ended, of how many, and how far the one is that is waited for."""


@dataclass(frozen=True, slots=True)
class Line:
    """One VM that was at the host.

    Attributes:
        vm_id: its id.
        name: its name.
        user: whose it is; empty: it is nobody's any more.
        outcome: `moved`; `failed`: its move did not succeed; or `remaining`: it was not moved.
        why: why it is there still, or empty.
        runs: whether it runs there.
    """

    vm_id: uuid.UUID
    name: str
    user: str
    outcome: Literal["moved", "failed", "remaining"]
    why: str
    runs: bool


def drain(platform: Platform, host: str, tell: Ends) -> list[Line]:
    """Has a host emptied, and waits until all operations have ended; what became of each VM, by user and name.

    Args:
        platform: whose administrator asks.
        host: its name.
        tell: is told how far it is.

    Raises:
        SpvtpmError: the platform's refusal; or it is away. What was begun goes on; the same again waits for it.
    """
    begun = platform.drain(host)
    ended = [
        _end(platform, operation, number, len(begun.moving), tell) for number, operation in enumerate(begun.moving)
    ]
    return _lines(host, begun, ended, platform.vms(of_all=True))


def _end(platform: Platform, operation: Operation, number: int, total: int, tell: Ends) -> Operation:
    """How an operation has ended; or how far it is, if it does not."""
    newest = operation

    def told(now: Operation) -> None:
        nonlocal newest
        newest = now
        tell(number, total, now)

    try:
        return wait_for_end(platform, operation, told)
    except Unavailable:
        if newest.state in ("done", "failed"):
            raise
        return newest


def _lines(host: str, begun: Drain, ended: list[Operation], vms: list[Vm]) -> list[Line]:
    all_vms = {vm.vm_id: vm for vm in vms}
    there = {vm.vm_id: vm for vm in vms if vm.host == host}
    whys = {vm.vm_id: vm.why for vm in begun.remaining}
    lines = []
    for operation in ended:
        vm, left = all_vms.get(operation.vm_id), there.pop(operation.vm_id, None)
        user = "" if vm is None else vm.user
        if left is None:
            lines.append(Line(operation.vm_id, operation.vm_name, user, "moved", "", runs=False))
        else:
            lines.append(Line(left.vm_id, left.name, user, "failed", _why(operation), _runs(left)))
    for vm in there.values():
        why = whys.get(vm.vm_id, "it came while the host was being drained; say it again")
        lines.append(Line(vm.vm_id, vm.name, vm.user, "remaining", why, _runs(vm)))
    return sorted(lines, key=lambda line: (line.user, line.name))


def _why(operation: Operation) -> str:
    if operation.error is not None:
        return operation.error.detail
    return "it is there still" if operation.state == "done" else f"it has not ended: {operation.step}"


def _runs(vm: Vm) -> bool:
    return vm.state == "running"
