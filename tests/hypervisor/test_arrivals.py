"""What can go wrong around a VM's arrival and departure besides deaths: nothing of it loses the VM, or leaves it halted."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import msgspec
import pytest

from spvtpm.hypervisor.records import Record
from spvtpm.wire.agent_api import HandoffReport
from spvtpm.wire.errors import SpvtpmError
from tests.hypervisor.running_agent import RunningAgent
from tests.hypervisor.two_hosts import Carrying, TwoHosts, handoff_of
from tests.processor.migration.two_chips import Side

_REMEMBER = "echo remembered > note; tpm2_pcrextend 10:sha256=" + "ab" * 32
_RECALL = "cat note; tpm2_pcrread sha256:10"
_PREPARED = 2
"""The frame in which a destination says that it has all."""

_UNTOUCHED = "0x" + "0" * 64

_STOPS_AFTER = """
import asyncio, os, signal
from spvtpm.hypervisor import performer

carry_out = performer.Performer.perform

async def perform(self, step, record):
    record = await carry_out(self, step, record)
    if step.name == {step!r}:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(1)
    return record

performer.Performer.perform = perform
from spvtpm.cli import main
main()
"""

_FAILS = """
from spvtpm.hypervisor import departure, secure_processor
from spvtpm.wire.errors import StorageError
from spvtpm.wire.messages import SendCancel

left = [{cancels}]
call = secure_processor.SecureProcessor.call

async def failing(self, request, kind):
    if isinstance(request, SendCancel) and left[0]:
        left[0] -= 1
        raise StorageError("the disk is full")
    return await call(self, request, kind)

async def breaks(self):
    raise BrokenPipeError("nobody takes it")

secure_processor.SecureProcessor.call = failing
if {breaks}:
    departure.Departure._open_memory = breaks
from spvtpm.cli import main
main()
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as running:
        yield running


@pytest.fixture
def vm_id(hosts: TwoHosts) -> Iterator[uuid.UUID]:
    """A VM that runs at the first host, and remembers."""
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    yield vm_id
    for agent in (hosts.a, hosts.b):  # as they are without faults
        agent.stop()
        agent.start()
    hosts.destroy(vm_id)


def _carry_without_commit(hosts: TwoHosts, vm_id: uuid.UUID) -> HandoffReport:
    """The link, but for its last frame: the destination has all, and has yet to hear that the vTPM is its own."""
    is_prepared = threading.Event()

    def copied(agent: RunningAgent) -> int:
        return handoff_of(agent.report(vm_id)).copied_bytes

    def has_all() -> bool:
        return hosts.a.report(vm_id).machine == "changing" and 0 < copied(hosts.a) == copied(hosts.b)

    def hook(side: Side, number: int, frame: bytes) -> list[bytes]:
        if (side, number) == ("destination", _PREPARED):
            seen = 0
            while (seen := seen + 1 if has_all() else 0) < 5:  # it has halted, and nothing more comes
                pass
            is_prepared.set()
        return [] if side == "source" and is_prepared.is_set() else [frame]

    return hosts.carry(vm_id, hosts.begin(vm_id), hook)


def _restart(hosts: TwoHosts, program: str) -> None:
    hosts.b.stop()
    hosts.b.start_program(program)


@pytest.mark.claim("C8")
def test_an_agent_that_is_stopped_in_order_as_a_vm_arrives_goes_on_with_its_memory(
    hosts: TwoHosts, vm_id: uuid.UUID
) -> None:
    known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)
    _restart(hosts, _STOPS_AFTER.format(step="RECEIVE_FINISH"))
    gone = hosts.carry(vm_id, hosts.begin(vm_id))
    number = hosts.b.next_sequence()
    with pytest.raises(SpvtpmError):
        hosts.b.order(vm_id, "running", number, handoff=gone.handoff, token=gone.token)
    assert hosts.b.process is not None
    hosts.b.process.wait(60)
    hosts.b._reap()
    hosts.b.start()

    come = handoff_of(hosts.b.order(vm_id, "running", number, handoff=gone.handoff, token=gone.token))
    hosts.forget(vm_id, come)

    assert hosts.b.run_in_vm(vm_id, "sh", "-c", _RECALL) == known


@pytest.mark.claim("C8")
def test_memory_that_has_come_whole_outlives_the_secure_processors_restart(hosts: TwoHosts, vm_id: uuid.UUID) -> None:
    known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)
    gone = _carry_without_commit(hosts, vm_id)
    hosts.b.sp.kill()
    hosts.b.sp.start()

    hosts.forget(vm_id, hosts.receive(vm_id, gone))

    assert hosts.b.run_in_vm(vm_id, "sh", "-c", _RECALL) == known


@pytest.mark.claim("C8")
def test_a_vm_whose_memory_is_lost_with_the_host_boots_with_the_pcrs_of_a_boot(
    hosts: TwoHosts, vm_id: uuid.UUID
) -> None:
    gone = _carry_without_commit(hosts, vm_id)
    hosts.b.kill()
    hosts.b.sp.kill()
    hosts.b.sp.start()
    hosts.b.start()

    hosts.forget(vm_id, hosts.receive(vm_id, gone))

    assert _UNTOUCHED in hosts.b.run_in_vm(vm_id, "tpm2_pcrread", "sha256:10")


@pytest.mark.claim("C8")
def test_a_vm_whose_memory_was_damaged_on_the_way_boots(hosts: TwoHosts, vm_id: uuid.UUID) -> None:
    damages = (
        "from spvtpm.wire.memory_records import NewestRecords\n"
        "whole = NewestRecords.stream\n"
        "NewestRecords.stream = lambda self: (data := whole(self))[:-1] + bytes([data[-1] ^ 1])\n"
        "from spvtpm.cli import main\nmain()\n"
    )
    _restart(hosts, damages)
    gone = hosts.carry(vm_id, hosts.begin(vm_id))
    number = hosts.b.next_sequence()
    with pytest.raises(SpvtpmError, match="did not come up"):
        hosts.b.order(vm_id, "running", number, handoff=gone.handoff, token=gone.token)

    come = handoff_of(hosts.b.order(vm_id, "running", number, handoff=gone.handoff, token=gone.token))
    hosts.forget(vm_id, come)

    hosts.b.wait_running(vm_id)
    assert _UNTOUCHED in hosts.b.run_in_vm(vm_id, "tpm2_pcrread", "sha256:10")


@pytest.mark.claim("C8")
def test_what_a_vm_left_behind_in_another_life_does_not_keep_its_memory_away(hosts: TwoHosts, vm_id: uuid.UUID) -> None:
    known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)
    hosts.b.stop()
    before = Record(vm_id=vm_id, sequence=1, want="absent", resuming=True)  # its owner took it while it could not go on
    path = hosts.b.directory / "orders" / str(vm_id)
    path.write_bytes(msgspec.json.encode(before))
    path.chmod(0o600)
    hosts.b.start()
    hosts.b.next_sequence()

    hosts.move(vm_id)

    assert hosts.b.run_in_vm(vm_id, "sh", "-c", _RECALL) == known


@pytest.mark.claim("C8")
@pytest.mark.parametrize(("breaks", "cancels"), [(True, 0), (False, 2), (True, 1)])
def test_a_departure_that_fails_and_cannot_be_settled_at_once_is_settled_later(
    hosts: TwoHosts, vm_id: uuid.UUID, breaks: bool, cancels: int
) -> None:
    """Without another order: nobody else would let the machine go on."""
    known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)
    hosts.a.stop()
    hosts.a.start_program(_FAILS.format(breaks=breaks, cancels=cancels))
    hosts.a.wait_running(vm_id)
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    known = hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL)
    handoff = hosts.begin(vm_id)
    link = Carrying(hosts.a, hosts.b, vm_id, handoff, lambda _side, number, frame: [frame] if number < 3 else [])
    if not breaks:
        link.cut()
    kept = hosts.decided(vm_id)
    link.cut()
    link.wait()

    assert kept.outcome == "kept" and kept.failure
    assert hosts.a.run_in_vm(vm_id, "sh", "-c", _RECALL) == known
    hosts.take_back(vm_id, kept)


@pytest.mark.claim("C8")
def test_a_move_to_which_no_link_comes_says_so(hosts: TwoHosts, vm_id: uuid.UUID) -> None:
    begun = handoff_of(hosts.a.order(vm_id, "departing"))
    hosts.a.kill()
    hosts.a.start()

    kept = hosts.decided(vm_id)

    assert (kept.handoff, kept.outcome) == (begun.handoff, "kept")
    assert kept.failure == "no link to the other host came in time, or the agent was started anew"
    another = handoff_of(hosts.a.order(vm_id, "departing"))
    assert another.outcome == "open" and another.handoff != begun.handoff
    hosts.a.order(vm_id, "running")
    for _order in range(3):
        hosts.b.next_sequence()


def test_a_host_that_is_full_can_still_be_told_that_a_vm_does_not_come(hosts: TwoHosts, vm_id: uuid.UUID) -> None:
    config = hosts.b.directory / "agent.toml"
    text = config.read_text()
    hosts.b.stop()
    config.write_text(text + "max_vms = 1\n")
    hosts.b.start()
    hosts.b.order(uuid.uuid4(), "defined")
    try:
        assert hosts.b.order(vm_id, "absent", handoff="1" * 32, token="2" * 64).want == "absent"
    finally:
        config.write_text(text)
