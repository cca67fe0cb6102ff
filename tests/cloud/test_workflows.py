"""Operations from their submission to their end: what they order, what they leave, what they undo."""

from __future__ import annotations

import threading
import uuid

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError

from spvtpm.cloud import tables
from spvtpm.cloud.duties import Duties
from spvtpm.cloud.plans import UNDOING
from spvtpm.wire.agent_api import Order
from spvtpm.wire.errors import WorkerError
from spvtpm.wire.platform_api import Operation, Wants
from tests.cloud.agent_double import AgentDouble
from tests.cloud.platform_database import PlatformDatabase
from tests.cloud.waiting import done, eventually, online, running_vm, state
from tests.postgres import PostgresServer


def test_a_vms_whole_life(platform: PlatformDatabase, agent: AgentDouble, duties: Duties) -> None:
    online(platform)
    vm_id = running_vm(platform, agent)
    done(platform, platform.submit("shutdown", vm_id))
    assert state(platform, vm_id) == "stopped"
    agent.take(vm_id)
    done(platform, platform.submit("release", vm_id))
    vm = platform.vm(vm_id)
    assert vm is not None and (vm.state, vm.host, vm.vtpm, vm.failure) == ("away", None, "", "")
    done(platform, platform.submit("place", vm_id))
    agent.provision(vm_id)
    done(platform, platform.submit("start", vm_id))
    done(platform, platform.submit("hibernate", vm_id))
    assert state(platform, vm_id) == "hibernated"
    agent.take(vm_id)
    done(platform, platform.submit("destroy", vm_id))
    assert platform.vm(vm_id) is None
    events = platform.events(vm_id)
    assert events[:4] == ["asked", "created", "asked", "started"] and events[-2:] == ["asked", "destroyed"]
    assert not agent.refused


def test_the_image_of_a_hibernated_vm_travels_with_it(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, duties: Duties
) -> None:
    online(platform, "h1")
    online(platform, "h2")
    vm_id = done(platform, platform.create("one", Wants(host="h1"))).vm_id
    agent.provision(vm_id)
    done(platform, platform.submit("start", vm_id))
    done(platform, platform.submit("hibernate", vm_id))
    agent.take(vm_id)
    done(platform, platform.submit("release", vm_id))
    assert agent.vms[vm_id].image is None
    done(platform, platform.submit("place", vm_id, wants=Wants(host="h2")))
    assert other_agent.vms[vm_id].image == b"memory of " + vm_id.bytes
    other_agent.vms[vm_id].block = "hibernated"
    done(platform, platform.submit("resume", vm_id))
    with platform.engine.connect() as connection:
        assert connection.execute(select(tables.images)).all() == []
    assert state(platform, vm_id) == "running"


def test_without_a_host_nothing_is_left_of_a_creation(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    asked = platform.create("one", Wants(minimum_firmware=7))
    ended = platform.ended(asked)
    assert ended.error is not None and ended.error.code == "no-host"
    assert "h1: firmware 1 is older than 7" in ended.error.detail
    assert platform.vm(asked.vm_id) is None
    done(platform, platform.create("one", vm_id=asked.vm_id))


def test_a_vm_is_placed_where_there_is_most_room(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, duties: Duties
) -> None:
    agent.max_vms = other_agent.max_vms = 3
    eventually(lambda: all(platform.host(host).report is not None for host in ("h1", "h2")))
    asked = [platform.create(f"vm{number}") for number in range(7)]
    ended = [platform.ended(one) for one in asked]
    failed = [one for one in ended if one.error is not None]
    assert len(failed) == 1 and failed[0].error is not None
    assert "h1: full (3 of 3); h2: full (3 of 3)" in failed[0].error.detail
    assert len(agent.vms) == len(other_agent.vms) == 3


def test_a_host_that_has_just_gone_takes_no_vm(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble
) -> None:
    blind = Duties(platform.engine, replica="here", patience_s=60.0, look_every_s=3600.0)
    blind.start()
    platform.submitted = blind.wake
    try:
        online(platform, "h1")
        online(platform, "h2")
        agent.down()
        vm_id = done(platform, platform.create("one")).vm_id
        asked = platform.create("two", Wants(host="h1"))
        eventually(lambda: "choosing a host: no host takes" in platform.operation(asked.operation_id).step)
        agent.up()
        assert platform.ended(asked).state == "done"
    finally:
        blind.close()
    assert vm_id in other_agent.vms and vm_id not in agent.vms
    assert asked.vm_id in agent.vms


def test_a_start_that_the_host_refuses_is_undone_and_says_why(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    vm_id = done(platform, platform.create("one")).vm_id
    agent.provision(vm_id)

    def refuse(_vm: uuid.UUID, order: Order) -> None:
        if order.want == "running":
            raise WorkerError("the vTPM's process died")

    agent.after_order = refuse
    ended = platform.ended(platform.submit("start", vm_id))
    assert ended.error is not None and (ended.error.code, ended.error.detail) == ("worker", "the vTPM's process died")
    first, last = [order for _, order in agent.carried_out][-2:]
    assert (first.want, last.want, last.sequence) == ("running", "stopped", first.sequence + UNDOING)
    assert state(platform, vm_id) == "stopped"
    assert platform.events(vm_id)[-1] == "failed"


def test_what_was_not_woken_sleeps_on(platform: PlatformDatabase, agent: AgentDouble, duties: Duties) -> None:
    online(platform)
    vm_id = running_vm(platform, agent)
    done(platform, platform.submit("hibernate", vm_id))

    def refuse(_vm: uuid.UUID, order: Order) -> None:
        if order.want == "running":
            raise WorkerError("no memory")

    agent.before_order = refuse
    assert platform.ended(platform.submit("resume", vm_id)).state == "failed"
    assert agent.vms[vm_id].want == "hibernated" and agent.vms[vm_id].image is not None
    assert state(platform, vm_id) == "hibernated"


def test_a_vm_whose_owner_has_not_taken_it_is_not_released(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    vm_id = running_vm(platform, agent)
    done(platform, platform.submit("shutdown", vm_id))
    for kind in ("release", "destroy"):
        ended = platform.ended(platform.submit(kind, vm_id))
        assert ended.error is not None and ended.error.code == "wrong-state" and "h1" in ended.error.detail
    assert state(platform, vm_id) == "stopped" and agent.vms[vm_id].block == "stopped"


def test_a_host_that_is_away_for_a_moment_delays_an_operation(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    vm_id = running_vm(platform, agent)
    agent.down()
    asked = platform.submit("shutdown", vm_id)
    duties.wake()
    eventually(lambda: platform.operation(asked.operation_id).state == "running")
    agent.up()
    done(platform, asked)


def test_an_operation_on_a_host_that_stays_away_fails_and_what_it_did_is_seen_later(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    vm_id = done(platform, platform.create("one")).vm_id
    agent.provision(vm_id)
    agent.after_order = lambda _vm, _order: agent.down()  # carried out, and nobody hears of it
    ended = platform.ended(platform.submit("start", vm_id))
    assert ended.error is not None and ended.error.code == "unavailable"
    assert ended.error.detail.startswith("host h1 does not answer") and "when it is back" in ended.error.detail
    assert state(platform, vm_id) == "placed"
    eventually(lambda: platform.host("h1").failure)
    agent.after_order = lambda _vm, _order: None
    agent.up()
    eventually(lambda: state(platform, vm_id) == "running")
    assert not platform.host("h1").failure
    assert platform.events(vm_id)[-1] == "running"


def test_what_a_creation_left_at_a_host_that_went_away_is_swept_up(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    agent.after_order = lambda _vm, _order: agent.down()
    asked = platform.create("one")
    assert platform.ended(asked).state == "failed"
    assert platform.vm(asked.vm_id) is None and agent.vms[asked.vm_id].want == "defined"
    agent.after_order = lambda _vm, _order: None
    agent.up()
    eventually(lambda: agent.vms[asked.vm_id].want == "absent")
    online(platform)
    done(platform, platform.create("one", vm_id=asked.vm_id))  # its numbers are newer than all of that
    assert agent.vms[asked.vm_id].want == "defined"


def test_a_vm_whose_owner_took_it_and_said_nothing_is_released(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    vm_id = running_vm(platform, agent)
    done(platform, platform.submit("shutdown", vm_id))
    agent.take(vm_id)
    eventually(lambda: state(platform, vm_id) == "away")
    assert agent.vms[vm_id].want == "absent"


def test_a_vm_that_its_owner_has_yet_to_provision_is_left_alone(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    first = done(platform, platform.create("one")).vm_id
    second = running_vm(platform, agent, "two")
    done(platform, platform.submit("shutdown", second))
    agent.take(second)
    eventually(lambda: state(platform, second) == "away")  # long enough for the first, too
    assert state(platform, first) == "placed" and agent.vms[first].want == "defined"


def test_what_happens_to_a_vm_at_its_host_is_seen(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    vm_id = running_vm(platform, agent)
    agent.vms[vm_id].boots += 1
    eventually(lambda: "rebooted" in platform.events(vm_id))
    agent.vms[vm_id].failure = "the machine died three times"
    eventually(lambda: state(platform, vm_id) == "failed")
    vm = platform.vm(vm_id)
    assert vm is not None and vm.failure == "the machine died three times"
    agent.vms[vm_id].failure = ""
    eventually(lambda: state(platform, vm_id) == "running")
    del agent.vms[vm_id]
    eventually(lambda: state(platform, vm_id) == "failed")
    vm = platform.vm(vm_id)
    assert vm is not None and vm.failure == "host h1 does not know the VM"


def test_another_chip_under_a_hosts_name_gets_no_vm(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    agent.chip_id = "09" * 16
    eventually(lambda: platform.host("h1").failure)
    ended = platform.ended(platform.create("one"))
    assert ended.error is not None and "its secure processor is another one" in ended.error.detail
    assert platform.host("h1").chip_id == "01" * 16


def test_a_host_that_does_not_answer_takes_no_other_host_away(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, duties: Duties
) -> None:
    online(platform)
    online(platform, "h2")
    asked, over = threading.Event(), threading.Event()

    def silence(*_request: object) -> bytes:
        asked.set()
        over.wait()
        return b"{}"

    other_agent.answer = silence  # type: ignore[method-assign, assignment]
    try:
        assert asked.wait(30)
        before = platform.host("h1").seen_s
        eventually(lambda: platform.host("h1").seen_s > before + 5, within_s=15)
    finally:
        over.set()


def test_one_chip_at_two_hosts_is_believed_of_the_first(
    platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, duties: Duties
) -> None:
    other_agent.chip_id = agent.chip_id
    eventually(lambda: sorted(bool(platform.host(host).failure) for host in ("h1", "h2")) == [False, True])


def test_an_operation_that_the_engine_lost_is_ended(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(platform)
    monkeypatch.setattr("spvtpm.cloud.duties._LOST_AFTER_S", 0.0)
    asked = platform.create("one")
    with platform.engine.begin() as connection:  # as if the engine's tables had been restored from an older copy
        row = connection.execute(select(tables.operations)).one()
        lost = row._asdict() | {
            "operation_id": uuid.uuid4(),
            "vm_id": uuid.uuid4(),
            "handed_over": True,
            "state": "running",
            "changed_s": 0.0,
        }
        connection.execute(insert(tables.operations).values(lost))
        values = {"operation": lost["operation_id"], "vm_id": lost["vm_id"], "name": "lost"}
        vm = connection.execute(select(tables.vms)).one()
        connection.execute(insert(tables.vms).values(vm._asdict() | values | {"host": None}))
    done(platform, asked)
    eventually(lambda: platform.operation(lost["operation_id"]).state == "failed")
    assert platform.vm(lost["vm_id"]) is None


def stopped_in_the_middle(platform: PlatformDatabase, agent: AgentDouble) -> Operation:
    """A creation whose replica was stopped in order while an order was on its way."""
    asked_for, let_go = threading.Event(), threading.Event()

    def hold(_vm: uuid.UUID, _order: Order) -> None:
        asked_for.set()
        assert let_go.wait(60)

    agent.before_order = hold
    first = Duties(platform.engine, replica="here", look_every_s=0.1)
    first.start()
    online(platform)
    asked = platform.create("one")
    assert asked_for.wait(60)
    first.close()
    let_go.set()
    return asked


def test_stopped_in_order_with_an_order_on_its_way_the_operation_goes_on_at_the_next_start(
    platform: PlatformDatabase, agent: AgentDouble
) -> None:
    asked = stopped_in_the_middle(platform, agent)
    assert platform.operation(asked.operation_id).state == "running"
    second = Duties(platform.engine, replica="here")
    second.start()
    done(platform, asked)
    second.close()
    assert platform.events(asked.vm_id) == ["asked", "created"]


def test_what_a_release_with_other_steps_had_begun_is_ended_as_failed(
    platform: PlatformDatabase, agent: AgentDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stopped_in_the_middle(platform, agent)
    monkeypatch.setattr("spvtpm.cloud.dbos_engine.APPLICATION_VERSION", "another")
    monkeypatch.setattr("spvtpm.cloud.duties._LOST_AFTER_S", 0.0)
    second = Duties(platform.engine, replica="here", look_every_s=0.1)
    second.start()
    ended = platform.ended(asked)
    assert ended.error is not None and "lost on the way" in ended.error.detail
    assert platform.vm(asked.vm_id) is None
    eventually(lambda: agent.vms[asked.vm_id].want == "absent")  # what it had begun is swept up
    second.close()


def test_a_database_that_goes_away_delays_operations_and_ends_none(
    platform: PlatformDatabase, agent: AgentDouble, duties: Duties, request: pytest.FixtureRequest
) -> None:
    if platform.engine.name == "sqlite":
        pytest.skip("a file does not go away")
    server: PostgresServer = request.getfixturevalue("postgres_server")
    online(platform)
    vm_id = running_vm(platform, agent)
    went = threading.Event()

    def power_loss(_vm: uuid.UUID, _order: Order) -> None:
        if not went.is_set():
            server.stop("immediate")
            went.set()

    agent.after_order = power_loss
    asked = platform.submit("shutdown", vm_id)
    assert went.wait(60)
    server.start()
    eventually(lambda: answers(platform))
    done(platform, asked)
    assert state(platform, vm_id) == "stopped"
    done(platform, platform.submit("start", vm_id))


def answers(platform: PlatformDatabase) -> bool:
    """Whether the database does."""
    try:
        platform.host("h1")
    except DBAPIError:
        return False
    return True
