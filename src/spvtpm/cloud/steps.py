"""What the steps of `plans.py` do, and what undoes an operation. Each may be repeated: it finds what it has done already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import Connection, Row, delete, insert, select, update

from spvtpm.cloud import tables
from spvtpm.cloud.choosing import Choice, choose_host
from spvtpm.cloud.moves import MOVES, undo_move
from spvtpm.cloud.plans import DOING, UNDOING
from spvtpm.cloud.undertakings import Undertaking
from spvtpm.wire.agent_api import WantedState
from spvtpm.wire.errors import WrongState
from spvtpm.wire.platform_api import OperationKind, Wants

if TYPE_CHECKING:
    from collections.abc import Callable


def _choose_host(work: Undertaking) -> None:
    def place(connection: Connection, _: Row[Any], host: str) -> None:
        connection.execute(update(tables.vms).where(tables.vms.c.vm_id == work.vm_id).values(host=host))

    choose_host(
        work,
        Choice(
            is_made=lambda _connection, vm: vm.host is not None,
            wants=lambda vm: msgspec.convert(vm.wants, Wants),
            make=place,
        ),
    )


def _give_image(work: Undertaking) -> None:
    agent = work.agent()
    with work.database.connect() as connection:
        image = connection.scalar(select(tables.images.c.content).where(tables.images.c.vm_id == work.vm_id))
    if agent is not None and image is not None:
        agent.give_image(work.vm_id, work.sequence + DOING, image)


def _see_taken(work: Undertaking) -> None:
    agent = work.agent()
    if agent is not None and agent.vm_report(work.vm_id).security_block is not None:
        raise WrongState(f"the secure processor of host {agent.host} still has this VM: its owner has to take it first")


def _fetch_image(work: Undertaking) -> None:
    agent = work.agent()
    if agent is None:
        return
    image = agent.image(work.vm_id) if agent.vm_report(work.vm_id).image else None
    with work.database.begin() as connection:
        work.locked_vm(connection)
        connection.execute(delete(tables.images).where(tables.images.c.vm_id == work.vm_id))
        if image is not None:
            connection.execute(insert(tables.images).values(vm_id=work.vm_id, content=image))


def _ordering(want: WantedState) -> Callable[[Undertaking], None]:
    def step(work: Undertaking) -> None:
        work.order(want, DOING)

    return step


def _forget(work: Undertaking) -> None:
    if work.agent() is not None:
        work.order("absent", DOING)


STEPS: Final[dict[str, Callable[[Undertaking], None]]] = {
    "choose-host": _choose_host,
    "give-image": _give_image,
    "define": _ordering("defined"),
    "run": _ordering("running"),
    "stop": _ordering("stopped"),
    "hibernate": _ordering("hibernated"),
    "see-taken": _see_taken,
    "fetch-image": _fetch_image,
    "forget": _forget,
    **MOVES,
}


def _unplace(work: Undertaking) -> None:
    if work.agent() is not None:
        work.order("absent", UNDOING)


def _stop_again(work: Undertaking) -> None:
    agent = work.agent()
    if agent is None:
        return
    block = agent.vm_report(work.vm_id).security_block
    # What was not woken sleeps on: to order it stopped would lose its memory.
    work.order("hibernated" if block is not None and block.state == "hibernated" else "stopped", UNDOING)


def _go_on(work: Undertaking) -> None:
    work.order("running", UNDOING)


UNDO: Final[dict[OperationKind, Callable[[Undertaking], None]]] = {
    "create": _unplace,
    "place": _unplace,
    "start": _stop_again,
    "resume": _stop_again,
    "hibernate": _go_on,
    "migrate": undo_move,
}
"""Of the other kinds nothing is undone: what they ordered is the way to go, and asking again goes on with it."""
