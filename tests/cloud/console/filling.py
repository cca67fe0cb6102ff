"""A platform's database with something in each corner of it, for the console to show."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import insert, update

from spvtpm.cloud import auth, tables
from spvtpm.cloud.database import Database
from spvtpm.cloud.migrations import migrate
from spvtpm.wire.agent_api import HostReport
from spvtpm.wire.introductions import Papers
from spvtpm.wire.platform_api import NewToken, PublishedPcrs, Scope, Wants
from spvtpm.wire.problems import Problem


class FilledDatabase:
    """Users alice and bob with a VM or more each, an administrator root, two hosts.

    Attributes:
        url: where it is.
        database: it.
        tokens: of each user, by name.
        vms: ids, by name.
    """

    def __init__(self, directory: Path) -> None:
        self.url = f"sqlite:///{directory / 'platform.sqlite'}"
        self.database = Database(self.url)
        migrate(self.database)
        self.tokens: dict[str, str] = {}
        self.vms: dict[str, uuid.UUID] = {}
        self.add_user("alice", "vms")
        self.add_user("bob", "read")
        self.add_user("root", "admin")
        self.add_host("host-1", "01" * 16)
        self.add_host(
            "host-2", "02" * 16, seen_s=time.time() - 3600, failure="https://10.0.0.2:7581 refuses to connect"
        )

    def close(self) -> None:
        self.database.close()

    def add_user(self, name: str, scope: Scope, *, expires_s: float | None = None, note: str = "") -> None:
        """A user, if it is new, and a token, which is the one in `tokens` from now on."""
        with self.database.write() as connection:
            auth.add_user(connection, name)
            made = auth.make_token(connection, name, NewToken(scopes=[scope], note=note, expires_s=expires_s))
            self.tokens[name] = made.secret

    def add_host(self, name: str, chip_id: str, **values: Any) -> None:
        report = HostReport(
            chip_id=chip_id,
            firmware=3,
            software="0.1.0",
            max_vms=64,
            vms=3,
            active=1,
            parked=1,
            missing_protection=["swap is not encrypted"] if name == "host-2" else [],
            papers=Papers(chain=(b"der",) * 4),
        )
        row = {
            "name": name,
            "address": f"https://{name}.example:7581",
            "token": "t" * 32,
            "chip_id": chip_id,
            "report": msgspec.to_builtins(report),
            "seen_s": time.time() + 86_400,  # online, however long the test takes
            "created_s": time.time(),
        }
        with self.database.write() as connection:
            connection.execute(insert(tables.hosts).values(row | values))

    def add_vm(self, user: str, name: str, **values: Any) -> uuid.UUID:
        """A running VM on host-1, with published PCRs and two events; `values` instead."""
        vm_id = uuid.uuid4()
        now_s = time.time()
        zeros = {str(index): "00" * 32 for index in range(24)}
        measured = (
            zeros | {"0": "a7" * 32, "7": "3c" * 32, "11": "5e" * 32} | {str(n): "ff" * 32 for n in range(17, 23)}
        )
        row = {
            "vm_id": vm_id,
            "user": user,
            "name": name,
            "state": "running",
            "host": "host-1",
            "wants": msgspec.to_builtins(Wants(minimum_firmware=3)),
            "sequence": 2,
            "vtpm_id": uuid.uuid4(),
            "vtpm": "active",
            "boots": 2,
            "failure": "",
            "pcrs": msgspec.to_builtins(PublishedPcrs(banks={"sha256": measured}, read_s=now_s - 300)),
            "created_s": now_s - 7200,
            "changed_s": now_s - 600,
        }
        with self.database.write() as connection:
            connection.execute(insert(tables.vms).values(row | values))
        self.add_event(vm_id, "created", "on host host-1", before_s=7100)
        self.add_event(vm_id, "started", "on host host-1", before_s=7000)
        self.vms[name] = vm_id
        return vm_id

    def add_event(self, vm_id: uuid.UUID, what: str, detail: str, *, before_s: float = 0) -> None:
        row = {"vm_id": vm_id, "what": what, "detail": detail, "time_s": time.time() - before_s}
        with self.database.write() as connection:
            connection.execute(insert(tables.events).values(row))

    def add_operation(self, user: str, vm_name: str, **values: Any) -> uuid.UUID:
        """One that runs; the VM knows it. `values` instead: then the VM does not."""
        operation_id = uuid.uuid4()
        now_s = time.time()
        row = {
            "operation_id": operation_id,
            "user": user,
            "kind": "start",
            "vm_id": self.vms[vm_name],
            "vm_name": vm_name,
            "sequence": 2,
            "state": "running",
            "step": "choosing a host",
            "steps_done": 1,
            "steps": 4,
            "request_sha256": bytes(32),
            "handed_over": True,
            "created_s": now_s - 5,
            "changed_s": now_s - 1,
        }
        with self.database.write() as connection:
            connection.execute(insert(tables.operations).values(row | values))
            if "state" not in values:
                row_of_vm = tables.vms.c.vm_id == self.vms[vm_name]
                connection.execute(update(tables.vms).where(row_of_vm).values(operation=operation_id))
        return operation_id

    def change_operation(self, operation_id: uuid.UUID, **values: Any) -> None:
        with self.database.write() as connection:
            operation = tables.operations.c.operation_id == operation_id
            connection.execute(update(tables.operations).where(operation).values(changed_s=time.time(), **values))

    def fill(self) -> None:
        """What a platform in use looks like."""
        self.add_vm("alice", "web")
        self.add_vm("alice", "database", vtpm="parked", pcrs=None)
        self.add_vm("alice", "build", state="away", host=None, vtpm="", pcrs=None)
        self.add_vm("alice", "mail", state="failed", vtpm="off", failure="the boot ended: the machine left at once")
        self.add_vm("bob", "secret-of-bob")
        error = Problem(
            type="urn:spvtpm:error:unavailable",
            title="Unavailable",
            status=503,
            detail="host host-2 does not answer",
            code="unavailable",
            hint="Try again in a moment.",
        )
        ended = {"steps_done": 4, "step": "done", "state": "done"}
        self.add_operation("alice", "database", **ended, kind="create", created_s=time.time() - 7000)
        self.add_operation("alice", "build", **ended, kind="release", created_s=time.time() - 3000)
        self.add_operation(
            "alice",
            "mail",
            state="failed",
            step="failed",
            steps_done=2,
            error=msgspec.to_builtins(error),
            created_s=time.time() - 900,
        )
