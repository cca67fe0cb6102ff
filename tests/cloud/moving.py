"""VMs that are to move between two doubles, and what has to be so in the end."""

from __future__ import annotations

import uuid

from sqlalchemy import select

from spvtpm.cloud import operations, tables
from spvtpm.wire.platform_api import Operation, Wants
from tests.cloud.agent_double import AgentDouble
from tests.cloud.platform_database import PlatformDatabase
from tests.cloud.waiting import done, eventually, online


class Pair:
    """Two hosts, `h1` with a VM that runs, and `h2`; each double watches that the other does not run what it runs.

    Attributes:
        vm_id: the VM.
        source: where it was when it was last asked to move.
    """

    def __init__(self, platform: PlatformDatabase, first: AgentDouble, second: AgentDouble) -> None:
        self.platform = platform
        self.first = first
        self.second = second
        self.source = "h1"
        first.others, second.others = [second], [first]
        for host in ("h1", "h2"):
            online(platform, host)
        self.vm_id = done(platform, platform.create("one", Wants(host="h1"))).vm_id
        first.provision(self.vm_id)
        done(platform, platform.submit("start", self.vm_id))
        with platform.engine.begin() as connection:
            connection.execute(tables.vms.update().values(wants={}))

    def migrate(self, destination: str | None = None) -> Operation:
        """Asks for it."""
        vm = self.platform.vm(self.vm_id)
        assert vm is not None
        self.source = str(vm.host)
        return self.platform.submit("migrate", self.vm_id, destination=destination)

    def settled(self) -> str:
        """The host where the VM runs, once everything is settled: it is at no other, and the row says so."""
        eventually(self._is_settled)
        (host,) = (name for name, double in self._doubles() if double.runs(self.vm_id))
        vm = self.platform.vm(self.vm_id)
        assert vm is not None and (vm.host, vm.state, vm.failure, vm.operation) == (host, "running", "", None)
        assert not self.first.violations and not self.second.violations
        return host

    def _doubles(self) -> list[tuple[str, AgentDouble]]:
        return [("h1", self.first), ("h2", self.second)]

    def _is_settled(self) -> bool:
        with self.platform.engine.connect() as connection:
            if connection.execute(select(tables.handoffs)).all():
                return False
        vm = self.platform.vm(self.vm_id)
        assert vm is not None
        having = [name for name, double in self._doubles() if double.has(self.vm_id)]
        return vm.operation is None and having == [vm.host]

    def detail(self) -> str:
        """Of the last event that tells of a move."""
        events = tables.events
        query = select(events.c.detail).where(events.c.vm_id == self.vm_id, events.c.what == "migrated")
        with self.platform.engine.connect() as connection:
            return str(connection.scalars(query.order_by(events.c.number.desc())).first())

    def cancel_current(self) -> None:
        """Asks to cancel what is under way."""
        vm = self.platform.vm(self.vm_id)
        assert vm is not None
        self.cancel(vm.operation)

    def cancel(self, operation_id: uuid.UUID) -> None:
        """Asks for it."""
        with self.platform.engine.begin() as connection:
            operations.cancel(connection, "ada", operation_id)
