"""What the steps of a migration do, and what undoes it. Each may be repeated: it finds what it has done already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import Connection, Row, select

from spvtpm.cloud import handoffs, hosts, operations, tables
from spvtpm.cloud.carrying import Carrying, why_kept
from spvtpm.cloud.choosing import Choice, choose_host
from spvtpm.cloud.plans import DOING
from spvtpm.cloud.undertakings import NotCurrent, Undertaking, WentThrough
from spvtpm.wire.agent_api import Order, VmReport
from spvtpm.wire.errors import MessageError
from spvtpm.wire.platform_api import Wants

if TYPE_CHECKING:
    from collections.abc import Callable

    from spvtpm.cloud.handoffs import Handoff


def _choose_destination(work: Undertaking) -> None:
    with work.database.connect() as connection:
        asked = connection.scalar(
            select(tables.operations.c.destination).where(tables.operations.c.operation_id == work.operation_id)
        )

    def wants(vm: Row[Any]) -> Wants:
        wanted = msgspec.convert(vm.wants, Wants)
        return wanted if asked is None else msgspec.structs.replace(wanted, host=asked)  # its owner's newest word

    def begin(connection: Connection, vm: Row[Any], host: str) -> None:
        handoffs.begin(connection, work.operation_id, work.vm_id, work.sequence, vm.host, host)

    def is_begun(connection: Connection, _: Row[Any]) -> bool:
        return handoffs.find(connection, work.operation_id) is not None

    choose_host(work, Choice(is_made=is_begun, wants=wants, make=begin))


def _depart(work: Undertaking) -> None:
    handoff = _current(work)
    if handoff.handoff is not None:
        return
    report = _order(work, handoff.source, handoff, Order(sequence=work.sequence + DOING, want="departing"))
    if report.handoff is None:
        raise MessageError(f"host {handoff.source} began no handoff")
    with work.database.begin() as connection:
        work.locked_vm(connection)
        handoffs.name(connection, work.operation_id, report.handoff.handoff)


def _arrive(work: Undertaking) -> None:
    handoff = _current(work)
    if handoff.outcome == "open":
        order = Order(sequence=work.sequence + DOING, want="arriving", handoff=handoff.handoff)
        _order(work, handoff.destination, handoff, order)


def _carry(work: Undertaking) -> None:
    handoff = _current(work)
    if handoff.outcome == "open":
        with Carrying(work, handoff) as carrying:
            handoff = carrying.run()
    if handoff.outcome == "kept":
        raise why_kept(handoff)


def _go_on(work: Undertaking) -> None:
    work.settler.tell_if_possible(work.settler.decide(_current(work)))


MOVES: Final[dict[str, Callable[[Undertaking], None]]] = {
    "choose-destination": _choose_destination,
    "depart": _depart,
    "arrive": _arrive,
    "carry": _carry,
    "go-on": _go_on,
}


def undo_move(work: Undertaking) -> None:
    """Has the VM stay where it is.

    Raises:
        WentThrough: it had gone, and goes on at its new host.
    """
    with work.database.connect() as connection:
        handoff = handoffs.find(connection, work.operation_id)
    if handoff is None:
        return
    decided = work.settler.decide(handoff)
    work.settler.tell_if_possible(decided)
    if decided.outcome == "gone":
        raise WentThrough


def _current(work: Undertaking) -> Handoff:
    with work.database.connect() as connection:
        handoff = handoffs.find(connection, work.operation_id)
        if handoff is None or not operations.is_current(connection, work.operation_id):
            raise NotCurrent
    return handoff


def _order(work: Undertaking, host: str, handoff: Handoff, order: Order) -> VmReport:
    with work.database.connect() as connection:
        agent = hosts.agent_of(connection, work.agents, host)
    return agent.order(handoff.vm_id, order)
