"""A VM moves from host to host while it runs: real agents, secure processors, machines, and a carrier that reads nothing."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import msgspec
import pytest
from websockets.exceptions import InvalidStatus

from spvtpm.terminal.console import Reading, carry_out, open_console, parse_words
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire.errors import MigrationForbidden, SpvtpmError, WrongState
from spvtpm.wire.platform_errors import CommandNotBegun, Superseded
from tests.hypervisor.running_agent import PATIENCE_S, RunningAgent
from tests.hypervisor.two_hosts import Carrying, TwoHosts, handoff_of
from tests.owner import ANYTHING
from tests.processor.migration.two_chips import Cut, Side

_REMEMBER = "echo remembered > note; tpm2_pcrextend 16:sha256=" + "ab" * 32
_RECALL = "cat note; tpm2_pcrread sha256:16"


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    """Two hosts, for the tests of this module that leave them as they were."""
    with TwoHosts() as running:
        yield running


def _stays(hosts: TwoHosts, vm_id: uuid.UUID, known: str) -> None:
    """It runs at its source in the boot that it was in, and nothing of it is elsewhere."""
    here, there = hosts.a.report(vm_id), hosts.b.report(vm_id)
    assert here.machine == "running" and here.security_block is not None and here.security_block.boots == 1
    assert (there.machine, there.security_block) == ("none", None)
    assert hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL) == known


@pytest.mark.claim("C8")
def test_a_vm_moves_with_its_memory_its_pcrs_and_its_vtpm_and_back(hosts: TwoHosts) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)

    hosts.move(vm_id)

    here, there = hosts.a.report(vm_id), hosts.b.report(vm_id)
    assert (here.machine, here.security_block, here.handoff) == ("none", None, None)
    assert there.machine == "running" and not there.image
    assert hosts.b.run_in_vm(vm_id, "sh", "-c", _RECALL) == known
    assert hosts.a.machine_pid(vm_id) is None

    hosts.turned().move(vm_id)
    assert hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL) == known
    assert hosts.b.machine_pid(vm_id) is None


def _random_if_begun(agent: RunningAgent, vm_id: uuid.UUID) -> bytes | None:
    """What its TPM gives a command; None: that has certainly not begun."""
    way = through_socket(agent.machine_directory(vm_id) / "console.sock")
    written = list[bytes]()
    try:
        console = open_console(way(PATIENCE_S), agent.sp.key(vm_id), vm_id)
    except SpvtpmError:  # nothing was said yet
        return None
    command = parse_words(["tpm2_getrandom", "4", "--hex"])
    try:
        code = carry_out(console, command, lambda _stream, data: written.append(data), Reading(None))
    except CommandNotBegun:
        return None
    assert code == 0, written
    return b"".join(written)


@pytest.mark.claim("C8")
def test_programs_that_use_the_vtpm_in_a_loop_see_a_pause_and_no_error(hosts: TwoHosts) -> None:
    vm_id, over, done = hosts.running_vm(), threading.Event(), list[bytes]()

    def loop() -> None:
        at = hosts.a
        while not over.is_set():
            random = _random_if_begun(at, vm_id)
            if random is None:
                at = hosts.b
            else:
                done.append(random)

    client = threading.Thread(target=loop)
    client.start()
    try:
        hosts.move(vm_id)
        at_arrival = len(done)
        hosts.b.wait_running(vm_id)
        hosts.b.run_in_vm(vm_id, "true")
    finally:
        over.set()
        client.join()
    assert at_arrival > 0 and all(len(random) == 8 for random in done)


@pytest.mark.claim("C8")
def test_what_is_carried_is_not_readable_for_those_who_carry_it(hosts: TwoHosts) -> None:
    vm_id, secret = hosts.running_vm(), uuid.uuid4().hex
    hosts.a.run_in_vm(vm_id, "sh", "-c", f"echo {secret} > note")
    carrying = Carrying(hosts.a, hosts.b, vm_id, hosts.begin(vm_id))
    carrying.wait()
    hosts.forget(vm_id, hosts.receive(vm_id, hosts.decided(vm_id)))

    carried = b"".join(frame for _side, frame in carrying.seen)
    assert len(carried) > 10_000 and secret.encode() not in carried and hosts.a.sp.key(vm_id) not in carried
    assert hosts.b.run_in_vm(vm_id, "cat", "note") == f"{secret}\n"


@pytest.mark.attack("A18")
@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("trick", ["cut", "altered", "doubled"])
def test_a_link_that_is_tampered_with_leaves_the_vm_where_it_is(hosts: TwoHosts, side: Side, trick: str) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)

    def tamper(of: Side, number: int, frame: bytes) -> list[bytes]:
        if of != side or number != 1:
            return [frame]
        if trick == "cut":
            raise Cut
        return [frame, frame] if trick == "doubled" else [frame[:-1] + bytes([frame[-1] ^ 1])]

    kept = hosts.carry(vm_id, hosts.begin(vm_id), tamper)
    hosts.take_back(vm_id, kept)

    assert kept.failure
    _stays(hosts, vm_id, known)


def test_a_move_that_nobody_wants_any_more_ends_and_the_vm_goes_on(hosts: TwoHosts) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)
    handoff, at_the_door, let_go = hosts.begin(vm_id), threading.Event(), threading.Event()

    def wait(side: Side, number: int, frame: bytes) -> list[bytes]:
        if side == "source" and number == 3:
            at_the_door.set()
            let_go.wait()
        return [frame]

    carrying = Carrying(hosts.a, hosts.b, vm_id, handoff, wait)
    assert at_the_door.wait(30)
    kept = handoff_of(hosts.a.order(vm_id, "running"))
    let_go.set()
    carrying.wait()
    hosts.b.order(vm_id, "absent", handoff=handoff, token=kept.token)

    assert kept.outcome == "kept"
    _stays(hosts, vm_id, known)


def test_who_does_not_want_it_any_more_too_late_hears_that_it_has_gone(hosts: TwoHosts) -> None:
    vm_id = hosts.running_vm()
    gone = hosts.carry(vm_id, hosts.begin(vm_id))

    with pytest.raises(WrongState, match="has moved"):
        hosts.a.order(vm_id, "running")

    after = handoff_of(hosts.a.report(vm_id))
    assert (after.outcome, after.token) == ("gone", gone.token)
    hosts.forget(vm_id, hosts.receive(vm_id, after))
    assert hosts.b.run_in_vm(vm_id, "echo", "on") == "on\n"


def test_each_order_of_a_move_may_be_repeated(hosts: TwoHosts) -> None:
    vm_id = hosts.running_vm()
    first, second = hosts.a.next_sequence(), hosts.a.next_sequence()
    begun = handoff_of(hosts.a.order(vm_id, "departing", first))
    assert handoff_of(hosts.a.order(vm_id, "departing", first)) == begun
    for _time in range(2):
        hosts.b.order(vm_id, "arriving", first, handoff=begun.handoff)
    gone = hosts.carry(vm_id, begun.handoff)
    assert handoff_of(hosts.a.order(vm_id, "departing", first)).outcome == "gone"
    come = [hosts.b.order(vm_id, "running", second, handoff=gone.handoff, token=gone.token) for _time in range(2)]
    for report in come:
        hosts.a.order(vm_id, "absent", second, handoff=gone.handoff, token=handoff_of(report).token)

    with pytest.raises(Superseded):
        hosts.b.order(vm_id, "arriving", first, handoff=begun.handoff)
    assert hosts.b.report(vm_id).machine == "running"


@pytest.mark.claim("C8")
@pytest.mark.attack("A17")
def test_a_vm_whose_owner_forbids_it_does_not_leave(hosts: TwoHosts) -> None:
    vm_id = uuid.uuid4()
    hosts.a.order(vm_id, "defined")
    hosts.a.provision(vm_id, msgspec.structs.replace(ANYTHING, migration_allowed=False))
    hosts.a.order(vm_id, "running")

    with pytest.raises(MigrationForbidden):
        hosts.a.order(vm_id, "departing")

    assert hosts.a.order(vm_id, "running").machine == "running"
    assert hosts.a.report(vm_id).handoff is None


def test_only_a_vm_that_runs_moves(hosts: TwoHosts) -> None:
    vm_id = hosts.a.new_vm()
    with pytest.raises(WrongState, match="does not run"):
        hosts.a.order(vm_id, "departing")


def test_a_link_for_no_handoff_is_refused(hosts: TwoHosts) -> None:
    vm_id = hosts.running_vm()
    for query, status in (("", 400), ("?handoff=" + "0" * 32, 404)):
        with pytest.raises(InvalidStatus) as refused, hosts.a.websocket(f"/v1/vms/{vm_id}/link{query}"):
            pass
        assert refused.value.response.status_code == status


def test_a_second_link_is_refused(hosts: TwoHosts) -> None:
    vm_id = hosts.running_vm()
    path = f"/v1/vms/{vm_id}/link?handoff={hosts.begin(vm_id)}"
    with hosts.a.websocket(path), pytest.raises(InvalidStatus) as refused, hosts.a.websocket(path):
        pass
    assert refused.value.response.status_code == 409
    hosts.take_back(vm_id, hosts.decided(vm_id))
