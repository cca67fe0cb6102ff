"""A vTPM moves between two real secure processors, while its VM uses it."""

from __future__ import annotations

import uuid

import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import NotFound, SpvtpmError, WrongState, WrongToken
from spvtpm.wire.framing import encode_frames
from spvtpm.wire.memory_records import NewestRecords
from spvtpm.wire.memory_stream import open_stream
from spvtpm.wire.migration import MemoryIn, parse_peer_message
from tests.harness import RunningSp
from tests.processor.migration.pasts import furnished, is_nowhere, runs, seen_of
from tests.processor.migration.two_chips import Frames, TwoChips, connect

pytestmark = pytest.mark.claim("C8")


def test_a_vtpm_moves_with_all_that_it_has_and_back_again(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    for source, destination in ((chips.a, chips.b), (chips.b, chips.a), (chips.a, chips.b)):
        handoff = chips.begin(vm_id, source=source)
        handoff.move(b"memory" * 10_000)
        runs(destination, vm_id, seen)
        assert is_nowhere(source, vm_id)
        handoff.close()


def test_memory_comes_as_it_was_in_the_end(chips: TwoChips) -> None:
    vm_id, _seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.send_memory(b"old" * 50_000)
    handoff.send_memory(b"new" * 40_000)
    nonce = handoff.stop()
    handoff.send_final(nonce)
    handoff.receive(handoff.finish())
    handoff.close()
    gathered = NewestRecords()
    for record in handoff.came:
        gathered.take(record)
    assert open_stream(chips.a.key(vm_id), handoff.id, nonce, gathered.stream()) == b"new" * 40_000


def test_until_it_is_stopped_it_runs_and_when_it_is_cancelled_it_goes_on(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    with chips.a.driver(vm_id) as driver:
        handoff = chips.begin(vm_id)
        handoff.send_memory(b"some")
        assert seen_of(driver) == seen
        handoff.stop()
        assert chips.a.vm(vm_id).state == "leaving"
        token = handoff.cancel()
        assert seen_of(driver) == seen  # the same session: its VM noticed nothing
    assert handoff.cancel() == token
    with pytest.raises(NotFound):
        handoff.finish()
    handoff.discard(token)
    assert is_nowhere(chips.b, vm_id)
    handoff.close()


def test_memory_behind_its_end_is_refused_and_the_vtpm_stays(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.send_memory(b"some")
    final = handoff.memory.final(handoff.stop(), len(b"some"))
    with connect(chips.a, MemoryIn(handoff.id)) as driver:
        driver.sendall(encode_frames([final, *handoff.memory.pages(b"more")]))
        refusal = Frames(driver).receive()
    assert refusal is not None
    assert isinstance(parse_peer_message(refusal), messages.ErrorReply)
    handoff.discard(handoff.cancel())
    handoff.close()
    runs(chips.a, vm_id, seen)


@pytest.mark.attack("A18")
def test_a_token_that_is_not_the_one_changes_nothing(chips: TwoChips) -> None:
    vm_id, seen = furnished(chips.a)
    handoff = chips.begin(vm_id)
    handoff.send_memory(b"some")
    handoff.send_final(handoff.stop())
    _until_arriving(chips.b, vm_id)
    for wrong in (bytes(32), b"\xff" * 32):
        with pytest.raises(WrongToken):
            handoff.receive(wrong)
        with pytest.raises(WrongToken):
            handoff.discard(wrong)
    with pytest.raises(WrongState):
        handoff.discard()
    assert chips.b.vm(vm_id).state == "arriving"
    with pytest.raises(SpvtpmError):
        chips.b.info(messages.StartVm(vm_id=vm_id))
    handoff.receive(handoff.finish())
    runs(chips.b, vm_id, seen)
    with pytest.raises(WrongState):
        handoff.cancel()
    handoff.close()


def _until_arriving(sp: RunningSp, vm_id: uuid.UUID) -> None:
    while is_nowhere(sp, vm_id):
        pass
