"""The platform is killed in the middle of operations, and they end: after a restart, or at another replica."""

from __future__ import annotations

import os
import random
import secrets
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from spvtpm.cloud import tables
from spvtpm.cloud.plans import PLANS
from spvtpm.wire.agent_api import Order
from spvtpm.wire.errors import WorkerError
from spvtpm.wire.platform_api import Operation, OperationKind
from tests.cloud.agent_double import AgentDouble
from tests.cloud.platform_database import PlatformDatabase
from tests.cloud.replica import ReplicaProcess
from tests.cloud.waiting import done, eventually, online, running_vm, state

Start = Callable[..., ReplicaProcess]


@pytest.fixture
def start(platform: PlatformDatabase, short_path: Path) -> Iterator[Start]:
    """Starts replicas by name; those that are left are stopped in the end."""
    running: list[ReplicaProcess] = []

    def start_one(name: str = "a", *, patience_s: float = 60.0, die_at: int = 0) -> ReplicaProcess:
        log = short_path / f"{name}.log"
        running.append(ReplicaProcess(platform.url, name, log, patience_s=patience_s, die_at=die_at))
        return running[-1]

    yield start_one
    for replica in running:
        replica.stop()


def dies(replica: ReplicaProcess, platform: PlatformDatabase, asked: Operation) -> bool:
    """Whether the replica kills itself before it has ended the operation."""
    process = replica.process
    eventually(lambda: process.poll() is not None or platform.operation(asked.operation_id).state == "done")
    if process.poll() is None:
        return False
    replica.await_death()
    return True


LIFE: tuple[tuple[OperationKind, str | None], ...] = (
    ("create", "placed"),
    ("start", "running"),
    ("hibernate", "hibernated"),
    ("release", "away"),
    ("place", "placed"),
    ("resume", "running"),
    ("shutdown", "stopped"),
    ("destroy", None),
)
"""A whole life: each operation, and how the VM is after it."""


def owner_acts(agent: AgentDouble, vm_id: uuid.UUID, after: OperationKind) -> None:
    """What a VM's owner does through the channel before the life goes on."""
    if after == "create":
        agent.provision(vm_id)
    elif after == "place":
        agent.vms[vm_id].block = "hibernated"
    elif after in {"hibernate", "shutdown"}:
        agent.take(vm_id)


@pytest.mark.parametrize("when", ["before it is carried out", "before it is answered"])
def test_killed_with_each_order_on_its_way_and_started_again_every_operation_of_a_life_ends_once(
    platform: PlatformDatabase, agent: AgentDouble, start: Start, when: str
) -> None:
    replica = start()
    online(platform)
    vm_id = uuid.uuid4()
    for kind, outcome in LIFE:
        killed = threading.Event()

        def kill(
            _vm: uuid.UUID, _order: Order, replica: ReplicaProcess = replica, killed: threading.Event = killed
        ) -> None:
            if not killed.is_set():
                replica.kill()
                killed.set()

        setattr(agent, "before_order" if when == "before it is carried out" else "after_order", kill)
        asked = platform.create("one", vm_id=vm_id) if kind == "create" else platform.submit(kind, vm_id)
        assert killed.wait(60)
        assert platform.operation(asked.operation_id).state == "running"
        replica = start()
        done(platform, asked)
        vm = platform.vm(vm_id)
        assert (None if vm is None else vm.state) == outcome
        first, again = [order for _, order in agent.carried_out][-2:]
        assert when == "before it is carried out" or first == again
        owner_acts(agent, vm_id, kind)
    events = platform.events(vm_id)
    assert events[::2] == ["asked"] * len(LIFE)
    assert events[1::2] == [PLANS[kind].event for kind, _ in LIFE]


def test_killed_at_every_touch_of_the_database_a_creation_ends_once(
    platform: PlatformDatabase, agent: AgentDouble, start: Start
) -> None:
    if platform.engine.name == "postgresql":
        pytest.skip("the same statements; one database will do for the sweep")
    with start("first"):
        online(platform)
    die_at = 0
    while True:
        die_at += 1
        asked = platform.create(f"vm{die_at}")
        replica = start("first", die_at=die_at)
        if not dies(replica, platform, asked):
            break
        with start("first"):
            done(platform, asked)
        assert state(platform, asked.vm_id) == "placed" and agent.vms[asked.vm_id].want == "defined"
        assert platform.events(asked.vm_id) == ["asked", "created"]
    assert die_at > 10


def test_killed_while_it_undoes_an_operation_it_goes_on_undoing(
    platform: PlatformDatabase, agent: AgentDouble, start: Start
) -> None:
    replica = start()
    online(platform)
    vm_id = done(platform, platform.create("one")).vm_id
    agent.provision(vm_id)
    killed = threading.Event()

    def refuse_then_kill(_vm: uuid.UUID, order: Order) -> None:
        if order.want == "running":
            raise WorkerError("no")
        if not killed.is_set():
            replica.kill()
            killed.set()

    agent.before_order = refuse_then_kill
    asked = platform.submit("start", vm_id)
    assert killed.wait(60)
    agent.before_order = lambda _vm, _order: None  # it would start now; but what was refused once is not tried again
    start()
    ended = platform.ended(asked)
    assert ended.error is not None and ended.error.code == "worker"
    assert state(platform, vm_id) == "stopped" and agent.vms[vm_id].boots == 0


def test_what_a_dead_replica_had_begun_another_one_finishes(
    platform: PlatformDatabase, agent: AgentDouble, start: Start
) -> None:
    first = start("a")
    online(platform)
    vm_id = running_vm(platform, agent)
    killed = threading.Event()

    def kill(_vm: uuid.UUID, _order: Order) -> None:
        if not killed.is_set():
            first.kill()
            killed.set()

    agent.after_order = kill
    asked = platform.submit("shutdown", vm_id)
    assert killed.wait(60)
    start("b")
    start("c")  # both may take it up; one does
    done(platform, asked)
    assert platform.events(vm_id)[-2:] == ["asked", "stopped"]


def test_a_replica_that_was_believed_dead_and_was_slow_changes_nothing_any_more(
    platform: PlatformDatabase, agent: AgentDouble, start: Start
) -> None:
    slow = start("a")
    online(platform)
    vm_id = done(platform, platform.create("one")).vm_id
    agent.provision(vm_id)
    stopped = threading.Event()

    def stop(_vm: uuid.UUID, order: Order) -> None:
        if not stopped.is_set() and order.want == "running":
            os.kill(slow.process.pid, signal.SIGSTOP)
            while not platform.is_writable():  # another of its threads was writing
                os.kill(slow.process.pid, signal.SIGCONT)
                os.kill(slow.process.pid, signal.SIGSTOP)
            stopped.set()
            raise WorkerError("no")  # which it hears when it goes on

    agent.before_order = stop
    asked = platform.submit("start", vm_id)
    assert stopped.wait(60)
    start("b")
    done(platform, asked)
    assert state(platform, vm_id) == "running"
    os.kill(slow.process.pid, signal.SIGCONT)  # it believes that the start failed, and wants to undo it
    eventually(lambda: "no longer owned" in slow.log_path.read_text() or agent.refused)
    done(platform, platform.submit("shutdown", vm_id))
    done(platform, platform.submit("start", vm_id))
    assert state(platform, vm_id) == "running" and agent.vms[vm_id].machine == "running"
    assert platform.operation(asked.operation_id).state == "done"


def test_with_replicas_killed_at_random_every_operation_ends(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, start: Start
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown if it fails
    chance = random.Random(seed)  # noqa: S311  # no secret
    doubles = {"h1": agent, "h2": other_agent}
    replicas = {name: start(name) for name in "ab"}
    for host in doubles:
        online(platform, host)
    ended: list[Operation] = []
    over = threading.Event()

    def kill_now_and_then() -> None:
        while not over.wait(chance.uniform(0.5, 3.0)):
            name = chance.choice("ab")
            replicas[name].kill()
            replicas[name] = start(name)

    def live(name: str) -> None:
        vm_id = done(platform, platform.create(name)).vm_id
        vm = platform.vm(vm_id)
        assert vm is not None
        doubles[vm.host].provision(vm_id)
        kinds: tuple[OperationKind, ...] = ("start", "hibernate", "resume", "shutdown")
        ended.extend(done(platform, platform.submit(kind, vm_id)) for kind in kinds)
        doubles[vm.host].take(vm_id)
        ended.append(done(platform, platform.submit("release", vm_id)))

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    lives = [threading.Thread(target=live, args=(f"vm{number}",)) for number in range(17)]
    for life in lives:
        life.start()
    for life in lives:
        life.join(240)
    over.set()
    killer.join()
    assert len(ended) == 17 * 5
    with platform.engine.connect() as connection:
        assert connection.scalar(select(func.count()).where(tables.vms.c.operation.is_not(None))) == 0
        assert connection.scalar(select(func.count()).where(tables.operations.c.state != "done")) == 0
        ends = select(func.count()).where(tables.events.c.what != "asked")
        assert connection.scalar(ends) == 17 * 6
    for double in doubles.values():
        assert all(vm.block is None and vm.want == "absent" and vm.boots == 1 for vm in double.vms.values())
