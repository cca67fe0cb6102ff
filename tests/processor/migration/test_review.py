"""What a hypervisor, a carrier or an owner could do to a handoff between its steps, and what comes of it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.processor.migration.manager import MAX_HANDOFFS
from spvtpm.processor.migration.peers import Peers
from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.wire import messages
from spvtpm.wire.errors import ChannelError, NotFound, SpvtpmError, StaleInstance, WrongState, WrongToken
from spvtpm.wire.framing import encode_frame
from spvtpm.wire.memory_records import PAGE_BYTES
from spvtpm.wire.migration import Link, MemoryIn, MemoryOut
from spvtpm.wire.owner_messages import PIECE_BYTES, DestroyVm, Done, ImportVtpm, Piece
from tests.harness import RunningSp
from tests.papers import todays_papers
from tests.processor.migration.pasts import furnished, is_nowhere, runs
from tests.processor.migration.two_chips import (
    PATIENCE_S,
    Carrier,
    Frames,
    Handoff,
    Hook,
    Memory,
    TwoChips,
    ask,
    connect,
    honest,
    list_of,
)

pytestmark = [pytest.mark.claim("B9"), pytest.mark.attack("A18")]


def until(happened: Callable[[], bool]) -> None:
    """Asks again and again, but not for ever."""
    ends = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < ends, "it does not happen"


def arrive(chips: TwoChips, vm_id: uuid.UUID, hook: Hook = honest) -> Handoff:
    """A handoff from the first to the second, up to where that one is prepared."""
    handoff = chips.begin(vm_id, hook)
    handoff.send_memory(b"memory")
    handoff.send_final(handoff.stop())
    until(lambda: not is_nowhere(chips.b, vm_id))
    return handoff


def residency(sp: RunningSp, vm_id: uuid.UUID) -> str:
    """Where its vTPM lives."""
    vtpm = sp.vm(vm_id).vtpm
    return "" if vtpm is None else vtpm.residency


def mapped_by(pid: int) -> bytes:
    """What a process has mapped; nothing if it is no more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/maps").read_bytes()
    return b""


def test_a_vtpm_that_is_parked_before_the_commit_token_comes_runs_then(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    chips.b.info(messages.ParkVtpm(vm_id=vm_id))
    handoff.forget(handoff.receive(handoff.finish()))
    runs(chips.b, vm_id, seen)
    handoff.close()


def test_a_vtpm_whose_process_dies_before_the_commit_token_comes_is_resumed(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    for pid in chips.b.workers():
        if b"spvtpm-crb" in mapped_by(pid):
            os.kill(pid, signal.SIGKILL)
    until(lambda: residency(chips.b, vm_id) == "failed")
    handoff.forget(handoff.receive(handoff.finish()))
    chips.b.info(messages.StartVm(vm_id=vm_id))
    runs(chips.b, vm_id, seen)
    handoff.close()


def test_a_second_link_does_not_part_the_destination_from_the_first(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.send_memory(b"memory")
    until(lambda: bool(handoff.came))
    with connect(chips.b, Link(handoff.id)) as second:
        assert Frames(second).receive()  # a refusal
        assert Frames(second).receive() is None
    handoff.send_final(handoff.stop())
    handoff.forget(handoff.receive(handoff.finish()))
    runs(chips.b, vm_id, seen)
    handoff.close()


@pytest.mark.attack("A23")
def test_an_owner_who_destroys_what_arrives_takes_no_place_from_others(chips: TwoChips) -> None:
    vm_id, _seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    with chips.b.channel(chips.a.owner) as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)
    token = handoff.finish()
    with pytest.raises(NotFound):
        handoff.receive(token)
    handoff.close()
    begun = [
        messages.ReceiveStart(vm_id=uuid.uuid4(), handoff=number.to_bytes(16, "big")) for number in range(MAX_HANDOFFS)
    ]
    for request in begun:
        ask(chips.b, request, messages.Handoff)
    for request in begun:
        ask(chips.b, messages.ReceiveCancel(vm_id=request.vm_id, handoff=request.handoff), messages.Handoff)


def test_what_is_asked_for_while_the_vtpm_is_being_stopped_leaves_nothing_in_doubt(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.send_memory(b"memory")
    until(lambda: bool(handoff.came))
    handoff.carrier.cut_when_quiet()
    stopping = threading.Thread(target=handoff.stop)
    stopping.start()
    with pytest.raises((WrongState, ChannelError)):
        handoff.finish()
    stopping.join()
    handoff.discard(handoff.cancel())
    runs(chips.a, vm_id, seen)
    handoff.close()


def test_a_handoff_that_came_to_nothing_can_be_ended_when_the_vtpm_is_gone_otherwise(chips: TwoChips) -> None:
    vm_id, _seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    handoff.carrier.cut()
    until(lambda: chips.a.vm(vm_id).state == "running")
    with chips.a.channel() as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)
    handoff.discard(handoff.cancel())
    assert is_nowhere(chips.b, vm_id)
    handoff.close()


def test_of_two_destinations_the_one_that_did_not_get_it_can_be_told_so_at_last(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    left = arrive(chips, vm_id)
    left.carrier.cut()
    until(lambda: chips.a.vm(vm_id).state == "running")
    with RunningSp(chips.a.state.with_name("c"), vendor=chips.vendor) as third:
        other = Handoff(chips.a, third, vm_id, honest, chips.revoked)
        other.move()
        runs(third, vm_id, seen)
        left.discard(left.cancel())
        assert is_nowhere(chips.b, vm_id)
        with pytest.raises(WrongState):
            other.cancel()
        other.close()
    left.close()


def test_a_vtpm_that_was_given_up_is_never_said_to_have_stayed(chips: TwoChips) -> None:
    vm_id, _seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.move()
    receipt = handoff.receive(handoff.finish())
    handoff.close()
    there_and_back = chips.begin(vm_id, source=chips.b)
    there_and_back.move()
    there_and_back.close()
    for _ in range(2):
        with pytest.raises(WrongState):
            handoff.cancel()
        handoff.forget(receipt)


def test_an_abort_token_is_told_to_nobody_who_names_another_vm(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = arrive(chips, vm_id)
    other = ask(chips.a, messages.SendCancel(vm_id=uuid.uuid4(), handoff=handoff.id), messages.HandoffToken)
    with pytest.raises(WrongToken):
        handoff.discard(other.token)
    handoff.receive(handoff.finish())
    runs(chips.b, vm_id, seen)
    handoff.close()


class Unread:
    """A handoff whose memory nobody takes at its destination, more of it than the way there holds."""

    def __init__(self, chips: TwoChips, vm_id: uuid.UUID, records: int = 256) -> None:
        self.chips, self.vm_id = chips, vm_id
        self.id = ask(chips.a, messages.SendStart(vm_id=vm_id), messages.Handoff).handoff
        ask(chips.b, messages.ReceiveStart(vm_id=vm_id, handoff=self.id), messages.Handoff)
        self.carrier = Carrier(chips.a, chips.b, self.id, revoked=chips.revoked)
        self.driver = connect(chips.a, MemoryIn(self.id))
        self.driver.settimeout(1.0)
        with suppress(TimeoutError):
            for record in Memory(chips.a.key(vm_id), self.id).pages(bytes(records * PAGE_BYTES)):
                self.driver.sendall(encode_frame(record))

    def cancel(self) -> None:
        """At both sides; then its connections are closed."""
        request = messages.SendCancel(vm_id=self.vm_id, handoff=self.id)
        token = ask(self.chips.a, request, messages.HandoffToken).token
        ask(self.chips.b, messages.ReceiveCancel(vm_id=self.vm_id, handoff=self.id, token=token), messages.Handoff)
        self.carrier.close()
        self.driver.close()


def quiet(carrier: Carrier) -> None:
    """Waits until nothing goes through any more."""
    before = -1
    while before != len(carrier.seen):
        before = len(carrier.seen)
        time.sleep(0.2)


def settled(sp: RunningSp) -> int:
    """How many descriptors it has once it makes no more processes ready."""
    before = -1
    while before != (now := descriptors(sp)):
        before = now
        time.sleep(0.5)
    return now


def descriptors(sp: RunningSp) -> int:
    """How many the daemon has open."""
    return len(list(Path(f"/proc/{sp.process.pid}/fd").iterdir()))


@pytest.mark.attack("A23")
def test_memory_that_nobody_takes_holds_nothing_once_its_handoff_is_cancelled(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    before = {sp: settled(sp) for sp in (chips.a, chips.b)}
    Unread(chips, vm_id).cancel()
    until(lambda: all(descriptors(sp) <= many for sp, many in before.items()))
    runs(chips.a, vm_id, seen)


@pytest.mark.attack("A23")
def test_who_takes_memory_late_learns_that_the_link_has_ended(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    for records in range(20, 30):  # some number of them fills all that is on the way, and no more
        handoff = Unread(chips, vm_id, records)
        with connect(chips.b, MemoryOut(handoff.id)) as taker:
            quiet(handoff.carrier)
            handoff.carrier.cut()
            frames = Frames(taker)
            while frames.receive() is not None:
                pass
        handoff.cancel()
    runs(chips.a, vm_id, seen)


@pytest.mark.attack("A16")
@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_destination_that_ends_before_the_commit_token_comes_resumes_it_afterwards(chips: TwoChips, way: str) -> None:
    vm_id, seen = furnished(chips.a)
    held = threading.Event()
    handoff = arrive(chips, vm_id, lambda side, _number, frame: [] if side == "source" and held.is_set() else [frame])
    held.set()  # the other side has all; the token by the link is lost
    token = handoff.finish()
    if way == "killed":
        chips.b.kill()
    else:
        assert chips.b.stop() == 0
    chips.b.start()
    handoff.receive(token)
    chips.b.info(messages.StartVm(vm_id=vm_id))
    runs(chips.b, vm_id, seen)
    handoff.close()


@pytest.mark.attack("A25")
def test_a_link_that_is_half_closed_under_whoever_writes_to_it_disturbs_no_other_connection(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = Unread(chips, vm_id)
    log = chips.a.log().count("the link of its migration has ended")
    handoff.carrier.half_close("source")
    until(lambda: chips.a.log().count("the link of its migration has ended") > log)
    clients = [SecureProcessorClient(chips.a.socket) for _ in range(8)]
    for client in clients:
        assert vm_id in {vm.vm_id for vm in client.list_vms()}
        client.close()
    handoff.cancel()
    runs(chips.a, vm_id, seen)


def test_an_import_beside_the_arrival_of_the_same_vtpm_makes_no_second_one(chips: TwoChips) -> None:
    for delay_ms in (0, 5, 10, 20, 30, 40, 60, 80):
        vm_id, other = chips.a.launch(), uuid.uuid4()
        chips.a.info(messages.StopVm(vm_id=vm_id))
        with chips.a.channel() as channel:
            _begins, file = channel.take_export(vm_id)
        chips.a.info(messages.StartVm(vm_id=vm_id))  # the file is void, but only its owner's terminal knows
        ask(chips.b, messages.AdmitVm(vm_id=other), messages.Admitted)
        handoff = chips.begin(vm_id)
        with chips.b.channel(chips.a.owner) as channel:
            announced = ImportVtpm(size_bytes=len(file), newest_version=0)
            channel.ask(chips.a.owner.provision(other, bytes(32), announced), Done)
            handoff.send_final(handoff.stop())
            time.sleep(delay_ms / 1000)
            pieces = [Piece(data=file[at : at + PIECE_BYTES]) for at in range(0, len(file), PIECE_BYTES)]
            for piece in pieces:
                channel.say(piece)
            with suppress(StaleInstance):
                channel.hear()
        with suppress(SpvtpmError):
            handoff.receive(handoff.finish())
        assert len([vm for vm in chips.b.vms() if vm.vm_id in (vm_id, other)]) == 1
        handoff.close()


@pytest.mark.attack("A17")
def test_of_two_lists_of_revoked_chips_that_come_together_the_newer_one_is_kept(tmp_path: Path) -> None:
    vendor, key = todays_papers(), bytes(32)
    older, newer = (list_of(vendor, (), number).encode() for number in (5, 6))

    async def act() -> bytes:
        NvStore.create(tmp_path / "nv.db", key)
        store = NvStore(tmp_path / "nv.db", key)

        async def commit(changes: Sequence[Change]) -> None:
            for _turn in range(3 if changes[0][1] == older else 1):  # a disk takes its time
                await asyncio.sleep(0)
            store.commit(changes).result()

        peers = Peers(store, commit, vendor.made.certificates)
        await asyncio.gather(peers.learn(newer), peers.learn(older))
        store.close()
        return peers.revoked

    assert asyncio.run(act()) == newer
