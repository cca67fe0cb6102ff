"""VMs move between hosts. In the end exactly one of the two runs each, and its row says which."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import pytest

from spvtpm.cloud.duties import Duties
from spvtpm.wire.agent_api import Order, WantedState
from spvtpm.wire.errors import MigrationForbidden, NotRunning, WorkerError, WrongState
from spvtpm.wire.platform_api import Wants
from spvtpm.wire.platform_errors import OperationUnderWay
from tests.cloud.agent_double import AgentDouble
from tests.cloud.moving import Pair
from tests.cloud.moving_double import FRAME, Arrival, Stage
from tests.cloud.platform_database import PlatformDatabase
from tests.cloud.waiting import done, eventually

STAGES: tuple[Stage, ...] = ("linked", "copied", "stopped", "ready", "gone")
pytestmark = [pytest.mark.claim("C8")]


@pytest.fixture
def pair(platform: PlatformDatabase, agent: AgentDouble, other_agent: AgentDouble, duties: Duties) -> Iterator[Pair]:
    """Two hosts, and a VM at the first."""
    yield Pair(platform, agent, other_agent)


@pytest.fixture
def sole_pair(platform: PlatformDatabase, pair: Pair) -> Pair:
    """The same, for what is tried many times; one database will do for that."""
    if platform.engine.name == "postgresql":
        pytest.skip("the same statements")
    return pair


def test_a_vm_moves_while_it_runs(pair: Pair) -> None:
    ended = done(pair.platform, pair.migrate())
    assert ended.kind == "migrate" and pair.settled() == "h2"
    assert pair.detail() == "from host h1 to host h2"
    assert pair.platform.events(pair.vm_id)[-2:] == ["asked", "migrated"]
    vm = pair.second.vms[pair.vm_id]
    assert isinstance(vm.move, Arrival) and vm.move.copied == pair.first.frames * FRAME
    assert vm.boots == 0  # it went on, and did not boot
    wants = [order.want for _, order in pair.second.carried_out]
    assert wants == ["arriving", "running"]
    done(pair.platform, pair.platform.submit("shutdown", pair.vm_id))
    assert pair.second.vms[pair.vm_id].want == "stopped"


def test_it_moves_there_and_back(pair: Pair) -> None:
    for host in ("h2", "h1", "h2"):
        done(pair.platform, pair.migrate(host))
        assert pair.settled() == host


def test_while_it_is_carried_the_step_says_how_much(pair: Pair) -> None:
    let_go = threading.Event()
    pair.first.at_stage = lambda _vm, stage: None if stage != "copied" else assert_set(let_go)
    pair.first.frames = 40
    asked = pair.migrate("h2")
    words = "moving the VM from host h1 to host h2: 2.5 MiB of its memory copied"
    eventually(lambda: pair.platform.operation(asked.operation_id).step == words)
    with pytest.raises(OperationUnderWay):
        pair.platform.submit("shutdown", pair.vm_id)
    let_go.set()
    done(pair.platform, asked)
    assert pair.settled() == "h2"


def assert_set(event: threading.Event) -> None:
    """Waits for it."""
    assert event.wait(60)


def test_no_host_takes_it(pair: Pair) -> None:
    pair.second.max_vms = 0
    eventually(lambda: pair.platform.host("h2").report["max_vms"] == 0)
    ended = pair.platform.ended(pair.migrate())
    assert ended.error is not None and ended.error.code == "no-host"
    assert ended.error.detail == "no host takes the VM: h1: the VM is there; h2: full (0 of 0)"
    ended = pair.platform.ended(pair.migrate("h1"))
    assert ended.error is not None and "h1: the VM is there" in ended.error.detail
    assert pair.settled() == "h1" and len(pair.first.carried_out) == 2


def test_a_vm_whose_owner_wants_it_at_one_host_moves_to_another_only_if_he_names_that(pair: Pair) -> None:
    vm_id = done(pair.platform, pair.platform.create("two", Wants(host="h1"))).vm_id
    pair.first.provision(vm_id)
    done(pair.platform, pair.platform.submit("start", vm_id))
    ended = pair.platform.ended(pair.platform.submit("migrate", vm_id))
    assert ended.error is not None and ended.error.detail == "no host takes the VM: h1: the VM is there"

    done(pair.platform, pair.platform.submit("migrate", vm_id, destination="h2"))
    row = pair.platform.vm(vm_id)
    assert row is not None and (row.host, row.wants["host"]) == ("h2", "h2")


@pytest.mark.parametrize("want", ["departing", "arriving"])
def test_what_a_secure_processor_forbids_fails_and_the_vm_runs_on(sole_pair: Pair, want: WantedState) -> None:
    pair = sole_pair

    def refuse(_vm: uuid.UUID, order: Order) -> None:
        if order.want == want:
            raise MigrationForbidden("its policy says no migration")

    pair.first.before_order = pair.second.before_order = refuse
    ended = pair.platform.ended(pair.migrate())
    assert ended.error is not None and ended.error.code == "migration-forbidden"
    assert pair.settled() == "h1" and pair.platform.events(pair.vm_id)[-1] == "failed"
    pair.first.before_order = pair.second.before_order = lambda _vm, _order: None
    done(pair.platform, pair.migrate())
    assert pair.settled() == "h2"
    pair.first.before_order = pair.second.before_order = refuse  # also of one that has moved before
    assert pair.platform.ended(pair.migrate()).state == "failed" and pair.settled() == "h2"


def test_what_fails_on_the_way_leaves_the_vm_where_it_was(pair: Pair) -> None:
    for at in STAGES[:-1]:

        def fail(_vm: uuid.UUID, stage: Stage, at: Stage = at) -> None:
            if stage == at:
                raise WorkerError("the machine fell")

        pair.first.at_stage = fail
        ended = pair.platform.ended(pair.migrate())
        assert ended.error is not None and ended.error.detail == "the VM stays at host h1: the machine fell"
        assert pair.settled() == "h1" and not pair.second.has(pair.vm_id)


@pytest.mark.parametrize("at", STAGES)
def test_cancelled_at_any_stage_it_is_where_its_source_says(sole_pair: Pair, at: Stage) -> None:
    pair, cancelled = sole_pair, threading.Event()

    def cancel(_vm: uuid.UUID, stage: Stage) -> None:
        if stage == at:
            pair.cancel_current()
            cancelled.set()
            if at != "gone":
                eventually(lambda: any(order.want == "running" for _, order in pair.first.carried_out[2:]))

    pair.first.at_stage = cancel
    ended = pair.platform.ended(pair.migrate())
    assert cancelled.is_set()
    if at == "gone":
        assert ended.state == "done" and pair.settled() == "h2"
    else:
        assert ended.error is not None and ended.error.code == "cancelled"
        assert pair.settled() == "h1"


@pytest.mark.parametrize("want", ["departing", "arriving"])
def test_cancelled_with_an_order_on_its_way_it_stays(sole_pair: Pair, want: WantedState) -> None:
    pair = sole_pair

    def cancel(_vm: uuid.UUID, order: Order) -> None:
        if order.want == want:
            pair.cancel_current()

    pair.first.before_order = pair.second.after_order = cancel
    ended = pair.platform.ended(pair.migrate())
    assert ended.error is not None and ended.error.code == "cancelled"
    assert pair.settled() == "h1"


def test_what_cannot_be_cancelled_says_why(pair: Pair) -> None:
    let_go = threading.Event()
    pair.first.before_order = lambda _vm, _order: assert_set(let_go)
    asked = pair.platform.submit("shutdown", pair.vm_id)
    with pytest.raises(WrongState, match="shutdown cannot be cancelled: only a migration can"):
        pair.cancel(asked.operation_id)
    let_go.set()
    done(pair.platform, asked)
    with pytest.raises(WrongState, match="has ended already: it is done"):
        pair.cancel(asked.operation_id)


# Hosts that go away


@pytest.mark.attack("A16")
@pytest.mark.parametrize("host", ["h1", "h2"])
@pytest.mark.parametrize("at", STAGES)
def test_a_host_that_goes_away_at_any_stage_and_comes_back_leaves_one_vm(sole_pair: Pair, host: str, at: Stage) -> None:
    pair = sole_pair
    double = {"h1": pair.first, "h2": pair.second}[host]
    went = threading.Event()

    def go(_vm: uuid.UUID, stage: Stage) -> None:
        if stage == at and not went.is_set():
            went.set()
            threading.Thread(target=double.down).start()
            eventually(lambda: not double.path.exists())

    pair.first.at_stage = go
    asked = pair.migrate()
    assert went.wait(60)
    ended = pair.platform.ended(asked)
    is_gone = at in {"ready", "gone"}  # the other side has all of it: no link is needed to give it up
    if ended.state == "failed" and is_gone:
        with pytest.raises(OperationUnderWay, match=f"settled as soon as host {host} answers"):
            pair.platform.submit("shutdown", pair.vm_id)
    eventually(lambda: not double.path.exists())
    double.up()
    assert pair.settled() == ("h2" if is_gone else "h1")
    assert is_gone or ended.state == "failed"


@pytest.mark.attack("A16")
@pytest.mark.parametrize(
    ("host", "want"), [("h1", "departing"), ("h2", "arriving"), ("h2", "running"), ("h1", "absent")]
)
@pytest.mark.parametrize("when", ["before_order", "after_order"])
def test_a_host_that_goes_away_with_an_order_and_comes_back_leaves_one_vm(
    sole_pair: Pair, host: str, want: WantedState, when: str
) -> None:
    pair = sole_pair
    double = {"h1": pair.first, "h2": pair.second}[host]
    went = threading.Event()

    def go(_vm: uuid.UUID, order: Order) -> None:
        if order.want == want and not went.is_set():
            went.set()
            threading.Thread(target=double.down).start()
            eventually(lambda: not double.path.exists())
            if when == "before_order":
                raise WorkerError("it was never carried out")

    setattr(double, when, go)
    asked = pair.migrate()
    assert went.wait(60)
    pair.platform.ended(asked)
    eventually(lambda: not double.path.exists())
    double.up()
    assert pair.settled() == ("h2" if want in {"running", "absent"} else "h1")


@pytest.mark.parametrize("want", ["departing", "arriving", "running", "absent"])
def test_an_order_whose_answer_is_lost_is_repeated(sole_pair: Pair, want: WantedState) -> None:
    pair = sole_pair
    lost = threading.Event()

    def lose(_vm: uuid.UUID, order: Order) -> None:
        if order.want == want and not lost.is_set():
            lost.set()
            raise NotRunning("nobody heard it")

    pair.first.after_order = pair.second.after_order = lose
    done(pair.platform, pair.migrate())
    assert lost.is_set() and pair.settled() == "h2"
