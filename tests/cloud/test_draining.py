"""A host is drained: it takes no VMs any more, those that run move away, and what stays is named, with what its owner can do."""

from __future__ import annotations

import uuid
from pathlib import Path

import msgspec
import pytest

from spvtpm.cloud import draining, tables
from spvtpm.cloud.duties import Duties
from spvtpm.wire.agent_api import Order
from spvtpm.wire.errors import MigrationForbidden, NotFound
from spvtpm.wire.platform_api import Drain, Host, Wants
from tests.cloud.agent_double import AgentDouble
from tests.cloud.platform_database import PlatformDatabase
from tests.cloud.served import ServedPlatform, new_vm, problem
from tests.cloud.waiting import done, eventually, online


def drain(platform: PlatformDatabase, name: str = "h1") -> Drain:
    """Asks for it."""
    with platform.engine.begin() as connection:
        found = draining.drain(connection, name)
    platform.submitted()
    return found


def placed_vm(platform: PlatformDatabase, agent: AgentDouble, name: str) -> uuid.UUID:
    """A VM that is provisioned at h1, and no owner wants it there alone."""
    vm_id = done(platform, platform.create(name)).vm_id
    agent.provision(vm_id)
    return vm_id


def test_what_runs_moves_away_and_what_does_not_is_named(
    platform: PlatformDatabase, agent: AgentDouble, short_path: Path, duties: Duties
) -> None:
    online(platform)
    running = [placed_vm(platform, agent, f"run{number}") for number in range(3)]
    off, asleep, pinned = (placed_vm(platform, agent, name) for name in ("off", "asleep", "pinned"))
    for vm_id in (*running, off, asleep, pinned):
        done(platform, platform.submit("start", vm_id))
    done(platform, platform.submit("shutdown", off))
    done(platform, platform.submit("hibernate", asleep))
    with platform.engine.begin() as connection:
        vms = tables.vms
        pin = msgspec.to_builtins(Wants(host="h1"))
        connection.execute(vms.update().where(vms.c.vm_id == pinned).values(wants=pin))
    with AgentDouble(short_path / "h2.sock", "02" * 16) as other:
        agent.others, other.others = [other], [agent]
        platform.add_host("h2", other)
        online(platform, "h2")
        begun = drain(platform)
        assert begun.host.is_draining
        assert {one.vm_id for one in begun.moving} == set(running)
        assert all(one.kind == "migrate" for one in begun.moving)
        why = {one.name: one.why for one in begun.remaining}
        assert why["pinned"] == "its owner wants it at host h1 alone"
        assert "it is off" in why["off"] and "`spvtpm vm recover off`" in why["off"]
        assert "it is hibernated" in why["asleep"]
        for one in begun.moving:
            done(platform, one)
        assert all(other.runs(vm_id) and not agent.has(vm_id) for vm_id in running)
        assert not agent.violations and not other.violations
        again = drain(platform)
        assert not again.moving and {one.name for one in again.remaining} == set(why)
        refused = platform.ended(platform.create("new", Wants(host="h1")))
        assert refused.error is not None and "h1: draining" in refused.error.detail
        with platform.engine.begin() as connection:
            assert not draining.end_drain(connection, "h1").is_draining
        done(platform, platform.create("new", Wants(host="h1")))


def test_a_vm_that_may_not_move_remains_and_is_tried_again_later(
    platform: PlatformDatabase,
    agent: AgentDouble,
    other_agent: AgentDouble,
    duties: Duties,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    online(platform)
    online(platform, "h2")
    vm_id = done(platform, platform.create("one")).vm_id
    agent.provision(vm_id)
    done(platform, platform.submit("start", vm_id))

    def refuse(_vm: uuid.UUID, order: Order) -> None:
        if order.want == "departing":
            raise MigrationForbidden("its policy says no migration")

    agent.before_order = refuse
    (moving,) = drain(platform).moving
    assert platform.ended(moving).state == "failed"
    again = drain(platform)
    assert not again.moving
    assert [one.why for one in again.remaining] == ["its migration failed: its policy says no migration"]
    monkeypatch.setattr(draining, "_FAILED_LATELY_S", 0.0)
    agent.before_order = lambda _vm, _order: None
    (moving,) = drain(platform).moving
    done(platform, moving)
    eventually(lambda: other_agent.runs(vm_id) and not agent.has(vm_id))


def test_a_host_that_there_is_not_cannot_be_drained(platform: PlatformDatabase) -> None:
    with pytest.raises(NotFound):
        drain(platform, "nowhere")
    with pytest.raises(NotFound), platform.engine.begin() as connection:
        draining.end_drain(connection, "nowhere")


def test_over_http_administrators_drain_and_owners_migrate_and_cancel(tmp_path: Path, short_path: Path) -> None:
    with ServedPlatform(tmp_path / "p") as served, AgentDouble(short_path / "h1.sock", "01" * 16) as agent:
        served.add_host("h1", agent.address, agent.host_report())
        owner, admin = served.token("ada", "vms"), served.token("root", "admin")
        with (
            served.client(admin) as root,
            served.client(owner) as ada,
            served.client(served.token("bob", "vms")) as bob,
        ):
            assert problem(ada.post("/v1/hosts/h1/drain")).code == "scope"
            drained = msgspec.json.decode(root.post("/v1/hosts/h1/drain").content, type=Drain)
            assert drained.host.is_draining and not drained.moving and not drained.remaining
            undrained = msgspec.json.decode(root.delete("/v1/hosts/h1/drain").content, type=Host)
            assert not undrained.is_draining
            created = ada.post("/v1/vms", json=new_vm()).json()
            refused = problem(ada.post(f"/v1/vms/{created['vm_id']}/migrate", json={"host": "h2"}))
            assert refused.code in {"wrong-state", "operation-under-way"}
            assert problem(root.post(f"/v1/vms/{created['vm_id']}/migrate", json={})).code == "scope"
            cancel = f"/v1/operations/{created['operation_id']}/cancel"
            assert problem(bob.post(cancel)).code == "not-found"
            assert problem(ada.post(cancel)).code == "wrong-state"
