"""The platform's database for tests of what works on it, and the few things that these tests ask and put there."""

from __future__ import annotations

import hashlib
import sqlite3
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any

from sqlalchemy import Row, insert, select

from spvtpm.cloud import operations, tables
from spvtpm.cloud.database import Database
from spvtpm.wire.platform_api import NewVm, Operation, OperationKind, Wants
from tests.cloud.agent_double import TOKEN, AgentDouble

USER = "ada"


class PlatformDatabase:
    """A new database with one user, and what a test wants to know of it.

    Attributes:
        url: where it is.
        engine: to it.
        submitted: called after each submission; the platform's service wakes its replica.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._database = Database(url)
        self.engine = self._database.engine
        self.submitted: Callable[[], None] = lambda: None
        tables.metadata.create_all(self.engine)
        with self.engine.begin() as connection:
            for name in (USER, "bob"):
                connection.execute(insert(tables.users).values(name=name, created_s=time.time()))

    def is_writable(self) -> bool:
        """Whether nobody has it locked; one that is no file is never locked as a whole."""
        file = self.url.removeprefix("sqlite:///")
        if file == self.url:
            return True
        try:
            for one in (file, f"{file}.workflows"):
                with closing(sqlite3.connect(one, timeout=0.5)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        return True

    def add_host(self, name: str, agent: AgentDouble) -> None:
        """A host that has not been looked at yet."""
        with self.engine.begin() as connection:
            connection.execute(
                insert(tables.hosts).values(name=name, address=agent.address, token=TOKEN, created_s=time.time())
            )

    def create(self, name: str, wants: Wants | None = None, vm_id: uuid.UUID | None = None) -> Operation:
        """Asks for a new VM."""
        new = NewVm(vm_id=vm_id or uuid.uuid4(), name=name, wants=wants or Wants())
        return self.submit("create", new.vm_id, new=new)

    def submit(self, kind: OperationKind, vm_id: uuid.UUID, *, user: str = USER, **more: Any) -> Operation:
        """Asks for an operation."""
        asked = {"request_sha256": hashlib.sha256(f"{kind} {vm_id}".encode()).digest(), **more}
        with self.engine.begin() as connection:
            operation = operations.submit(connection, user=user, kind=kind, vm_id=vm_id, **asked)
        self.submitted()
        return operation

    def operation(self, operation_id: uuid.UUID) -> Operation:
        """How an operation stands."""
        with self.engine.connect() as connection:
            return operations.read(connection, operation_id)

    def ended(self, operation: Operation, within_s: float = 60.0) -> Operation:
        """The operation, once it has ended."""
        deadline = time.monotonic() + within_s
        while True:
            now = self.operation(operation.operation_id)
            if now.state in {"done", "failed"}:
                return now
            assert time.monotonic() < deadline, now
            time.sleep(0.02)

    def vm(self, vm_id: uuid.UUID) -> Row[Any] | None:
        """A VM's row."""
        with self.engine.connect() as connection:
            return connection.execute(select(tables.vms).where(tables.vms.c.vm_id == vm_id)).one_or_none()

    def host(self, name: str) -> Row[Any]:
        """A host's row."""
        with self.engine.connect() as connection:
            return connection.execute(select(tables.hosts).where(tables.hosts.c.name == name)).one()

    def events(self, vm_id: uuid.UUID) -> list[str]:
        """The words of a VM's events, oldest first."""
        query = select(tables.events.c.what).where(tables.events.c.vm_id == vm_id).order_by(tables.events.c.number)
        with self.engine.connect() as connection:
            return list(connection.scalars(query))

    def close(self) -> None:
        """Ends."""
        self._database.close()
