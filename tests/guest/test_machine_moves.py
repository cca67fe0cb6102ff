"""An emulated VM whose memory goes elsewhere while it runs: what it is in the end arrives, and its owner sees a pause alone."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from spvtpm.terminal.console import run_command
from spvtpm.terminal.relay import Relay
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire.errors import ChannelError, SpvtpmError, WrongState
from spvtpm.wire.launch_secret import ComingMemory
from spvtpm.wire.machine_control import CopyMemory, FinishCopy, Suspend
from spvtpm.wire.memory_records import PAGE_BYTES, NewestRecords, PageLedger, parse_record
from spvtpm.wire.memory_stream import verify_final
from spvtpm.wire.messages import HibernateVm, StopVm
from spvtpm.wire.platform_errors import CommandNotBegun, MemoryStreamDamaged
from tests.guest.running_machine import PATIENCE_S, RunningMachine, ended
from tests.harness import RunningSp

T = TypeVar("T")
HANDOFF, STOP = b"h" * 16, b"s" * 32
COMING = ComingMemory(HANDOFF, STOP)
PCR = "tpm2_pcrread -Q -o /dev/stdout sha256:16 | od -An -tx1"


@pytest.fixture
def destination(machine: RunningMachine) -> Iterator[RunningMachine]:
    """Another directory for the same VM."""
    with RunningMachine(machine.sp) as other:
        other.vm_id = machine.vm_id
        yield other


@pytest.fixture
def no_vtpm(sp: RunningSp) -> Iterator[RunningMachine]:
    """A VM that runs, without a vTPM: quick to halt and to go on."""
    with RunningMachine(sp, with_vtpm=False) as machine:
        machine.begin()
        yield machine


def beside(function: Callable[[], T]) -> Future[T]:
    """Has it done in a thread."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function)
    finally:
        pool.shutdown(wait=False)


def copied(machine: RunningMachine, handoff: bytes = HANDOFF) -> list[bytes]:
    """A round."""
    return machine.copy(CopyMemory(handoff_id=handoff))


def finished(machine: RunningMachine, handoff: bytes = HANDOFF, stop: bytes = STOP) -> list[bytes]:
    """The last one."""
    return machine.copy(FinishCopy(handoff_id=handoff, stop_nonce=stop))


def stream(records: Iterable[bytes]) -> bytes:
    """As the destination's hypervisor stores it."""
    gathered = NewestRecords()
    for record in records:
        gathered.take(record)
    return gathered.stream()


def put(machine: RunningMachine, data: bytes) -> None:
    """Where it goes on from."""
    machine.image.write_bytes(data)
    machine.image.chmod(0o600)


def depart(machine: RunningMachine) -> list[bytes]:
    """The last records of a machine whose vTPM has left; hibernation stands for that. The machine is gone then."""
    machine.halt()
    machine.sp.info(HibernateVm(vm_id=machine.vm_id))
    records = finished(machine)
    machine.kill()
    return records


def test_a_vm_moves_with_what_changed_in_between_and_its_pcrs(
    machine: RunningMachine, destination: RunningMachine
) -> None:
    machine.shell(
        "tpm2_pcrextend 16:sha256=$(printf %064d 1); mkdir d; head -c 100000 /dev/urandom > d/much; echo 1 > z"
    )
    records = copied(machine)
    assert len(records) > 3
    machine.shell("echo 2 > z")
    second = copied(machine)
    assert len(second) < len(records)  # what has changed, alone
    assert copied(machine) == []
    sums = machine.shell("echo 3 > z; rm d/much; head -c 50000 /dev/urandom > d/other; sha256sum d/* z")
    before = machine.shell(PCR)

    records += second + depart(machine)
    ledger = PageLedger()
    for record in records[:-1]:
        ledger.take(parse_record(record))
    verify_final(machine.key, HANDOFF, STOP, ledger, records[-1])
    put(destination, stream(records))
    destination.resume(COMING)

    assert destination.shell("sha256sum d/* z") == sums
    assert destination.shell(PCR) == before


def test_a_vm_moves_back_and_sleeps_in_between(machine: RunningMachine, destination: RunningMachine) -> None:
    machine.shell("echo 1 > note")
    put(destination, stream(copied(machine) + depart(machine)))
    destination.resume(COMING)
    destination.shell("echo 2 >> note")
    destination.hibernate()  # replaces the stream
    destination.resume()
    destination.shell("echo 3 >> note")
    put(machine, stream(copied(destination) + depart(destination)))
    machine.resume(COMING)
    assert machine.shell("cat note") == b"1\n2\n3\n"


def test_no_copy_but_the_last_one_is_as_good(machine: RunningMachine, destination: RunningMachine) -> None:
    machine.shell("echo all at once > note")
    put(destination, stream(depart(machine)))
    destination.resume(COMING)
    assert destination.shell("cat note") == b"all at once\n"


@pytest.mark.attack("A18")
@pytest.mark.parametrize("what", ["older page", "missing page", "altered page", "other stop", "cut"])
def test_a_stream_that_is_not_the_last_word_is_refused_and_nothing_of_it_is_restored(
    machine: RunningMachine, destination: RunningMachine, what: str
) -> None:
    machine.shell("echo older > note")
    first = copied(machine)
    machine.shell("echo newer > note")
    last = depart(machine)
    good = stream(first + last)
    older, altered = [*last[:-1], *first, last[-1]], bytearray(first[0])
    altered[-1] ^= 1
    bad = {
        "older page": stream(older),
        "missing page": stream(last[-1:]),
        "altered page": stream([*last[:-1], bytes(altered), last[-1]]),
        "other stop": good,
        "cut": good[:-1],
    }[what]
    put(destination, bad)
    with pytest.raises(AssertionError, match=r"memory stream|pages? of the memory"):
        destination.resume(ComingMemory(HANDOFF, b"t" * 32 if what == "other stop" else STOP))
    destination.wait()
    assert list(destination.directory.iterdir()) == [destination.image]


@pytest.mark.attack("A10")
def test_a_stream_of_another_vm_is_refused(machine: RunningMachine, sp: RunningSp) -> None:
    data = stream(copied(machine) + depart(machine))
    with RunningMachine(sp) as other:
        other.begin()
        other.hibernate()
        put(other, data)
        with pytest.raises(AssertionError, match="another VM"):
            other.resume(COMING)
        other.wait()


@pytest.mark.attack("A18")
@pytest.mark.attack("A30")
def test_memory_goes_on_in_its_own_boot_alone(machine: RunningMachine, destination: RunningMachine) -> None:
    """A stream where the secure processor names none, a stream of another handoff, an image where it names a stream."""
    machine.shell("echo 1 > note")
    data = stream(copied(machine) + depart(machine))
    for kept, memory in ((data, None), (data, ComingMemory(b"x" * 16, STOP))):
        put(destination, kept)
        with pytest.raises(AssertionError, match="memory"):
            destination.resume(memory)
        destination.wait()
        machine.sp.info(StopVm(vm_id=machine.vm_id))
        machine.begin()
        machine.hibernate()
    image = machine.image.read_bytes()
    put(destination, image)
    with pytest.raises(AssertionError, match="memory stream"):
        destination.resume(COMING)
    destination.wait()


@pytest.mark.attack("A24")
def test_no_memory_is_in_what_the_hypervisor_carries(machine: RunningMachine) -> None:
    machine.shell("echo MARKER-OF-THE-MEMORY > note")
    carried = stream(copied(machine) + depart(machine))
    for secret in (machine.key, b"MARKER-OF-THE-MEMORY"):
        assert secret not in carried and secret.hex().encode() not in carried


def test_a_copy_is_finished_once_and_of_a_halted_machine_alone(machine: RunningMachine) -> None:
    with pytest.raises(WrongState):
        finished(machine)
    machine.halt()
    machine.halt()  # said again, as by an agent that has died meanwhile
    assert machine.state() == "halted"
    with pytest.raises(WrongState):
        machine.ask(Suspend())
    assert copied(machine)
    assert len(finished(machine)) == 1
    for stop in (STOP, b"t" * 32):
        with pytest.raises(WrongState, match="finished"):
            finished(machine, stop=stop)
    with pytest.raises(WrongState, match="finished"):
        copied(machine)
    machine.go_on()
    with pytest.raises(WrongState, match="finished"):
        copied(machine)
    assert copied(machine, b"x" * 16)
    with pytest.raises(WrongState, match="finished"):  # still: the memory may have changed
        copied(machine)
    machine.halt()
    assert len(finished(machine, b"x" * 16)) >= 1


def test_another_handoff_begins_anew(no_vtpm: RunningMachine) -> None:
    no_vtpm.shell(f"head -c {3 * PAGE_BYTES} /dev/urandom > much")
    first = copied(no_vtpm)
    assert copied(no_vtpm) == []
    assert [parse_record(record).index for record in copied(no_vtpm, b"x" * 16)] == [
        parse_record(record).index for record in first
    ]
    assert len(copied(no_vtpm)) == len(first)


def test_memory_that_is_too_much_to_move_is_told_and_the_machine_runs_on(no_vtpm: RunningMachine) -> None:
    no_vtpm.shell("head -c 20000000 /dev/zero > much")
    with pytest.raises(SpvtpmError, match="more than"):
        copied(no_vtpm)
    assert no_vtpm.shell("rm much; echo on") == b"on\n"
    assert copied(no_vtpm)


def test_a_machine_that_goes_on_has_its_vtpm_and_its_memory(machine: RunningMachine) -> None:
    machine.shell("tpm2_pcrextend 16:sha256=$(printf %064d 1); echo remember > note")
    before = machine.shell(PCR)
    for _ in range(2):
        machine.halt()
        machine.go_on()
        machine.go_on()
        assert machine.shell(f"cat note; {PCR}") == b"remember\n" + before


def test_a_machine_whose_vtpm_has_left_does_not_go_on(machine: RunningMachine) -> None:
    machine.halt()
    machine.sp.info(StopVm(vm_id=machine.vm_id))
    with pytest.raises(SpvtpmError):
        machine.go_on()
    assert machine.state() == "halted"
    machine.power_off()
    assert list(machine.directory.iterdir()) == []


def test_a_command_under_way_may_end_while_its_vm_is_halted(no_vtpm: RunningMachine) -> None:
    command = beside(lambda: no_vtpm.run("sh", "-c", "touch here; sleep 1; echo done"))
    while not (no_vtpm.memory / "here").exists():
        assert not command.done()
    no_vtpm.halt()
    assert command.result(PATIENCE_S) == (0, b"done\n", b"")


def test_nothing_runs_in_a_halted_machine(no_vtpm: RunningMachine) -> None:
    script = "setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $! > pid; exec sleep 1000"
    command = beside(lambda: no_vtpm.run("sh", "-c", script)[0])
    while not (no_vtpm.memory / "pid").exists() or not (no_vtpm.memory / "pid").read_text():
        assert not command.done()
    no_vtpm.halt()
    assert ended([int((no_vtpm.memory / "pid").read_text())])
    assert command.result(PATIENCE_S) == 128 + 15


class Watched:
    """A relay that does something before a message is sent over it, and tells when it has been sent.

    Args:
        relay: the way itself.
        number: of the message, from 1.
        before: what is done.
    """

    def __init__(self, relay: Relay, number: int, before: Callable[[], None]) -> None:
        self._relay, self._left, self._before = relay, number, before
        self.sent = threading.Event()
        self.deadline, self.receive, self.close = relay.deadline, relay.receive, relay.close

    def send(self, frames: Iterable[bytes]) -> None:
        messages = list(frames)
        self._left -= bool(messages)
        if messages and self._left == 0:
            self._before()
        self._relay.send(messages)
        if messages and self._left == 0:
            self.sent.set()


INTRODUCTION, RUN = 1, 4
"""In between: what opens the channel."""


def waiting(
    machine: RunningMachine, *arguments: str, number: int = INTRODUCTION, before: Callable[[], None] = lambda: None
) -> Future[int]:
    """A command that its owner wants to have run; he has said so much of it."""
    relay = Watched(through_socket(machine.directory / "console.sock")(PATIENCE_S), number, before)

    def run() -> int:
        return run_command(lambda _timeout_s: relay, machine.key, machine.vm_id, arguments, lambda *_: None)

    command = beside(run)
    assert relay.sent.wait(PATIENCE_S)
    return command


def test_a_command_waits_while_its_vm_is_halted(no_vtpm: RunningMachine) -> None:
    no_vtpm.halt()
    commands = [waiting(no_vtpm, "sh", "-c", f"touch ran{number}; exit {number}") for number in range(3)]
    assert len(finished(no_vtpm)) >= 2
    assert no_vtpm.state() == "halted"
    assert not any(command.done() for command in commands)
    assert list(no_vtpm.memory.iterdir()) == []
    no_vtpm.go_on()
    assert [command.result(PATIENCE_S) for command in commands] == [0, 1, 2]
    assert len(list(no_vtpm.memory.iterdir())) == 3


def test_a_command_that_is_told_to_a_halted_vm_waits(no_vtpm: RunningMachine) -> None:
    command = waiting(no_vtpm, "touch", "ran", number=RUN, before=no_vtpm.halt)
    assert no_vtpm.state() == "halted"
    assert not command.done() and list(no_vtpm.memory.iterdir()) == []
    no_vtpm.go_on()
    assert command.result(PATIENCE_S) == 0


def test_a_command_whose_vm_goes_away_meanwhile_has_not_begun_and_its_owner_knows(no_vtpm: RunningMachine) -> None:
    command = waiting(no_vtpm, "true", number=RUN, before=no_vtpm.halt)
    other = waiting(no_vtpm, "true")
    no_vtpm.power_off()
    with pytest.raises(CommandNotBegun):
        command.result(PATIENCE_S)
    with pytest.raises((ChannelError, CommandNotBegun), match=r"before the command could begin|powered off"):
        other.result(PATIENCE_S)  # said in clear, so by anybody, or in the channel: as far as it had come


def test_a_loop_of_commands_sees_pauses_and_no_error(machine: RunningMachine) -> None:
    stop = threading.Event()

    def loop() -> int:
        rounds = 0
        while not stop.is_set():
            assert len(machine.shell("tpm2_getrandom 4")) == 4
            rounds += 1
        return rounds

    rounds = beside(loop)
    for number in range(5):
        copied(machine, uuid.UUID(int=number).bytes)
        machine.halt()
        machine.go_on()
        assert not rounds.done()
    stop.set()
    assert rounds.result(PATIENCE_S) > 1


def test_who_does_not_wait_any_longer_makes_room_for_others(no_vtpm: RunningMachine) -> None:
    def threads() -> int:
        return len(list(Path(f"/proc/{no_vtpm.pid}/task").iterdir()))

    def becomes(count: int) -> bool:
        while threads() != count:
            assert no_vtpm.process is not None and no_vtpm.process.poll() is None
        return True

    before, relays = threads(), list[Relay]()
    no_vtpm.halt()
    assert becomes(before)
    while len(relays) < 16:  # as many as there may be
        relays.append(through_socket(no_vtpm.directory / "console.sock")(PATIENCE_S))
        assert becomes(before + len(relays))
    for relay in relays:
        relay.close()
    assert becomes(before)
    command = waiting(no_vtpm, "true")
    no_vtpm.go_on()
    assert command.result(PATIENCE_S) == 0


def test_what_is_no_stream_is_no_memory(machine: RunningMachine) -> None:
    with pytest.raises(MemoryStreamDamaged):
        stream([])
    machine.hibernate()
    put(machine, b"SPVTPMST" + bytes(200))
    with pytest.raises(AssertionError, match="memory stream"):
        machine.resume(COMING)
    machine.wait()
