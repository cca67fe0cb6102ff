"""What the steps of `plans.py` do, and what undoes an operation. Each may be repeated: it finds what it has done already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import Connection, Engine, Row, delete, insert, select, update

from spvtpm.cloud import hosts, tables
from spvtpm.cloud.placement import Candidate, choose
from spvtpm.cloud.plans import DOING, UNDOING
from spvtpm.wire.agent_api import Order, VmReport, WantedState
from spvtpm.wire.errors import ResourceError, SpvtpmError, WrongState
from spvtpm.wire.platform_api import OperationKind, Wants
from spvtpm.wire.platform_errors import NoHost, Unavailable

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

    from spvtpm.cloud.agents import Agent, Agents


class NotCurrent(Exception):  # not an error of ours: whoever ended the operation carries on
    """The operation is not under way at its VM any more."""


@dataclass(frozen=True, slots=True)
class Undertaking:
    """An operation that is being run.

    Attributes:
        operation_id: its id.
        kind: what it does.
        vm_id: with which VM.
        sequence: the first of the numbers that its orders may have.
        database: the platform's.
        agents: of all hosts.
    """

    operation_id: uuid.UUID
    kind: OperationKind
    vm_id: uuid.UUID
    sequence: int
    database: Engine
    agents: Agents

    def locked_vm(self, connection: Connection) -> Row[Any]:
        """The VM's row, which nobody else changes until the transaction ends.

        Raises:
            NotCurrent: the operation is over.
        """
        vm = connection.execute(
            update(tables.vms)  # an update, for SQLite locks nothing for a question
            .where(tables.vms.c.vm_id == self.vm_id, tables.vms.c.operation == self.operation_id)
            .values(operation=self.operation_id)
            .returning(tables.vms)
        ).one_or_none()
        if vm is None:
            raise NotCurrent
        return vm

    def agent(self) -> Agent | None:
        """The agent of the VM's host; None: it has no host.

        Raises:
            NotCurrent: the operation is over.
        """
        with self.database.connect() as connection:
            vm = connection.execute(
                select(tables.vms.c.host).where(
                    tables.vms.c.vm_id == self.vm_id, tables.vms.c.operation == self.operation_id
                )
            ).one_or_none()
            if vm is None:
                raise NotCurrent
            return None if vm.host is None else hosts.agent_of(connection, self.agents, vm.host)

    def order(self, want: WantedState, number: int) -> VmReport:
        """Orders the VM's host."""
        agent = self.agent()
        if agent is None:
            raise WrongState("the VM has no host")
        report = agent.order(self.vm_id, Order(sequence=self.sequence + number, want=want))
        if report.failure:
            raise ResourceError(f"host {agent.host}: {report.failure}")
        return report


def _choose_host(work: Undertaking) -> None:
    """A host that answers: one that was online a moment ago may be gone since, and would be waited for."""
    answering: set[str] = set()
    silent: dict[str, str] = {}
    while True:
        with work.database.begin() as connection:
            vm = work.locked_vm(connection)
            if vm.host is not None:
                return
            host = _best_host(msgspec.convert(vm.wants, Wants), hosts.candidates(connection), silent)
            if host in answering:
                connection.execute(update(tables.vms).where(tables.vms.c.vm_id == work.vm_id).values(host=host))
                return
            agent = hosts.agent_of(connection, work.agents, host)
        try:
            agent.host_report()
        except SpvtpmError as error:
            silent[host] = str(error)
        else:
            answering.add(host)


def _best_host(wants: Wants, candidates: list[Candidate], silent: dict[str, str]) -> str:
    try:
        return choose(
            wants,
            [replace(one, failure=silent[one.name]) if one.name in silent else one for one in candidates],
        )
    except NoHost as error:
        if silent:  # it may be back soon
            raise Unavailable(str(error)) from None
        raise


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
}
"""Of the other kinds nothing is undone: what they ordered is the way to go, and asking again goes on with it."""
