"""An operation that is being run, as its steps see it: its VM's row, its host's agent, its orders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, Row, select, update

from spvtpm.cloud import hosts, operations, tables
from spvtpm.cloud.durable import Leaving
from spvtpm.cloud.settling import Settler
from spvtpm.wire.agent_api import Order, VmReport, WantedState
from spvtpm.wire.errors import ResourceError, WrongState

if TYPE_CHECKING:
    import threading
    import uuid

    from spvtpm.cloud.agents import Agent, Agents
    from spvtpm.wire.platform_api import OperationKind


class NotCurrent(Exception):  # not an error of ours: whoever ended the operation carries on
    """The operation is not under way at its VM any more."""


class WentThrough(Exception):  # not an error of ours, either
    """The operation could not be undone, for it had gone too far; so it was done to its end."""


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
        leaving: set when this process is being stopped.
    """

    operation_id: uuid.UUID
    kind: OperationKind
    vm_id: uuid.UUID
    sequence: int
    database: Engine
    agents: Agents
    leaving: threading.Event

    @property
    def settler(self) -> Settler:
        """Settles the operation's handoff."""
        return Settler(self.database, self.agents)

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

    def pause(self, pause_s: float) -> None:
        """Waits.

        Raises:
            Leaving: this process is being stopped.
        """
        if self.leaving.wait(pause_s):
            raise Leaving

    def say(self, words: str) -> None:
        """Tells the operation's user what goes on."""
        with self.database.begin() as connection:
            operations.record_words(connection, self.operation_id, words)

    def order(self, want: WantedState, number: int) -> VmReport:
        """Orders the VM's host."""
        agent = self.agent()
        if agent is None:
            raise WrongState("the VM has no host")
        report = agent.order(self.vm_id, Order(sequence=self.sequence + number, want=want))
        if report.failure:
            raise ResourceError(f"host {agent.host}: {report.failure}")
        return report
