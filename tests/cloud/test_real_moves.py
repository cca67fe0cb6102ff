"""The platform moves a VM between two real hosts: agents, secure processors and machines are what they are."""

from __future__ import annotations

import time
import uuid

import pytest
from sqlalchemy import insert

from spvtpm.cloud import operations, tables
from spvtpm.cloud.duties import Duties
from spvtpm.wire.platform_api import Operation
from tests.cloud.platform_database import USER, PlatformDatabase
from tests.cloud.waiting import done, eventually, online
from tests.hypervisor.running_agent import RunningAgent
from tests.hypervisor.two_hosts import TwoHosts

_MARK = "echo remembered > note; tpm2_pcrextend 16:sha256=" + "ab" * 32
_RECALL = "cat note; tpm2_pcrread sha256:16"


def adopt(platform: PlatformDatabase, hosts: TwoHosts) -> uuid.UUID:
    """A VM that runs at the first host, and that the platform knows as if it had placed it there."""
    for name, agent in (("h1", hosts.a), ("h2", hosts.b)):
        row = {"name": name, "address": f"unix:{agent.directory / 'agent.sock'}", "token": agent.token}
        with platform.engine.begin() as connection:
            connection.execute(insert(tables.hosts).values(**row, created_s=time.time()))
    vm_id = hosts.running_vm()
    with platform.engine.begin() as connection:
        connection.execute(
            insert(tables.vms).values(
                vm_id=vm_id,
                user=USER,
                name="one",
                state="running",
                host="h1",
                wants={},
                sequence=1000,  # above what the test has ordered
                vtpm="active",
                boots=1,
                failure="",
                created_s=time.time(),
                changed_s=time.time(),
            )
        )
    for name in ("h1", "h2"):
        online(platform, name)
    return vm_id


def runs_at(agent: RunningAgent, vm_id: uuid.UUID) -> bool:
    """Whether the VM runs there."""
    return agent.report(vm_id).machine == "running"


@pytest.mark.claim("C8")
def test_a_vm_moves_there_and_back_with_what_it_remembers_and_a_cancelled_move_leaves_it(
    platform: PlatformDatabase, duties: Duties
) -> None:
    if platform.engine.name == "postgresql":
        pytest.skip("of the hosts, not of the database")
    with TwoHosts() as hosts:
        vm_id = adopt(platform, hosts)
        hosts.a.run_in_vm(vm_id, "sh", "-c", _MARK)
        known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)
        for here, there in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
            done(platform, platform.submit("migrate", vm_id))
            assert runs_at(there, vm_id) and not runs_at(here, vm_id)
            assert here.report(vm_id).security_block is None
            assert there.run_in_vm(vm_id, "sh", "-c", _RECALL) == known
        ended = cancelled(platform, vm_id)
        vm = platform.vm(vm_id)
        assert vm is not None
        assert (vm.host == "h2") == (ended.state == "done")
        here, there = (hosts.b, hosts.a) if vm.host == "h2" else (hosts.a, hosts.b)
        eventually(lambda: there.report(vm_id).security_block is None)
        assert runs_at(here, vm_id) and here.run_in_vm(vm_id, "sh", "-c", _RECALL) == known


def cancelled(platform: PlatformDatabase, vm_id: uuid.UUID) -> Operation:
    """A migration that is cancelled once its hosts have been ordered: in time or not."""
    asked = platform.submit("migrate", vm_id)
    eventually(lambda: platform.operation(asked.operation_id).steps_done >= 3)
    with platform.engine.begin() as connection:
        operations.cancel(connection, USER, asked.operation_id)
    return platform.ended(asked)
