"""The platform is killed in the midst of migrations, and they end, here or at another replica: exactly one host runs the VM."""

from __future__ import annotations

import random
import secrets
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spvtpm.wire.agent_api import Order
from spvtpm.wire.platform_api import Operation
from tests.cloud.agent_double import AgentDouble
from tests.cloud.moving import Pair
from tests.cloud.moving_double import Stage
from tests.cloud.platform_database import PlatformDatabase
from tests.cloud.replica import ReplicaProcess
from tests.cloud.waiting import eventually

Start = Callable[..., ReplicaProcess]
pytestmark = [pytest.mark.claim("C8"), pytest.mark.attack("A16")]

TOUCHES = 70
"""Of a migration's threads to the database, about; more when it is carried for long."""


@pytest.fixture
def start(platform: PlatformDatabase, short_path: Path) -> Iterator[Start]:
    """Starts replicas by name; those that are left are stopped in the end."""
    running: list[ReplicaProcess] = []

    def start_one(name: str = "a", *, die_at: int = 0) -> ReplicaProcess:
        running.append(ReplicaProcess(platform.url, name, short_path / f"{name}.log", die_at=die_at))
        return running[-1]

    yield start_one
    for replica in running:
        replica.stop()


@pytest.fixture
def sqlite_alone(platform: PlatformDatabase) -> None:
    """For what is tried many times."""
    if platform.engine.name == "postgresql":
        pytest.skip("the same statements; one database will do for the sweep")


def settled(pair: Pair, asked: Operation) -> None:
    """Where the VM is, and what its operation has said of it: whichever host it was, it was said."""
    ended = pair.platform.ended(asked)
    assert (ended.state == "done") == (pair.settled() != pair.source), ended


@pytest.mark.usefixtures("sqlite_alone")
def test_killed_with_each_order_on_its_way_and_started_again_exactly_one_runs_the_vm(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, start: Start
) -> None:
    replica = start()
    pair = Pair(platform, agent, other_agent)
    for want in ("departing", "arriving", "running", "absent"):
        for when in ("before_order", "after_order"):
            killed = threading.Event()

            def kill(
                _vm: uuid.UUID,
                order: Order,
                replica: ReplicaProcess = replica,
                killed: threading.Event = killed,
                want: str = want,
            ) -> None:
                if order.want == want and not killed.is_set():
                    replica.kill()
                    killed.set()

            for double in (agent, other_agent):
                double.before_order = double.after_order = lambda _vm, _order: None
                setattr(double, when, kill)
            asked = pair.migrate()
            assert killed.wait(60)
            replica = start()
            settled(pair, asked)


@pytest.mark.usefixtures("sqlite_alone")
def test_killed_at_each_stage_of_a_departure_and_started_again_exactly_one_runs_the_vm(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, start: Start
) -> None:
    replica = start()
    pair = Pair(platform, agent, other_agent)
    stages: tuple[Stage, ...] = ("linked", "copied", "stopped", "ready", "gone")
    for at in stages:
        killed = threading.Event()

        def kill(
            _vm: uuid.UUID,
            stage: Stage,
            replica: ReplicaProcess = replica,
            killed: threading.Event = killed,
            at: Stage = at,
        ) -> None:
            if stage == at and not killed.is_set():
                replica.kill()
                killed.set()

        agent.at_stage = other_agent.at_stage = kill
        asked = pair.migrate()
        assert killed.wait(60)
        replica = start()
        settled(pair, asked)


@pytest.mark.usefixtures("sqlite_alone")
def test_killed_at_any_touch_of_the_database_exactly_one_runs_the_vm(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, start: Start
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown if it fails
    chance = random.Random(seed)  # noqa: S311  # no secret
    with start("first"):
        pair = Pair(platform, agent, other_agent)
    for touch in sorted(chance.sample(range(1, TOUCHES), 8)):
        asked = pair.migrate()
        replica = start("first", die_at=touch)
        process = replica.process
        eventually(
            lambda process=process, asked=asked: (
                process.poll() is not None  # type: ignore[misc]
                or platform.operation(asked.operation_id).state in {"done", "failed"}
            )
        )
        replica.kill()
        with start("first"):
            settled(pair, asked)


def test_what_a_dead_replica_had_begun_to_move_another_one_settles(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, start: Start
) -> None:
    first = start("a")
    pair = Pair(platform, agent, other_agent)
    killed = threading.Event()

    def kill(_vm: uuid.UUID, stage: Stage) -> None:
        if stage == "gone" and not killed.is_set():
            first.kill()
            killed.set()

    agent.at_stage = kill
    asked = pair.migrate()
    assert killed.wait(60)
    start("b")
    start("c")  # both may take it up; one does
    settled(pair, asked)
    assert pair.settled() == "h2"
    assert platform.events(pair.vm_id)[-2:] == ["asked", "migrated"]
