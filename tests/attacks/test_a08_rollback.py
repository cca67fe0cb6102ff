"""A08: an older instance file of the same vTPM. Refused by version: by the ledger, and by what the owner says he has seen."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from spvtpm.processor.ledger import MAX_BUCKET_ENTRIES, Entry, Ledger
from spvtpm.processor.nv_store import NvStore
from spvtpm.wire import messages
from spvtpm.wire.errors import StaleInstance
from spvtpm.wire.owner_messages import DestroyVm, Done
from tests.guests_view import find_traces, leave_traces, stopped_with_traces
from tests.harness import RunningSp
from tests.owner import OwnerChannel

pytestmark = [pytest.mark.attack("A08"), pytest.mark.claim("B3")]


def run_on(sp: RunningSp, vm_id: uuid.UUID, nv: bytes) -> None:
    """Launches a VM that was brought back, and has it write."""
    sp.info(messages.LaunchVm(vm_id=vm_id))
    leave_traces(sp, vm_id, nv)
    sp.info(messages.StopVm(vm_id=vm_id))


def two_exports(sp: RunningSp, channel: OwnerChannel) -> tuple[uuid.UUID, bytes, bytes]:
    """A VM that is gone, its older and its newer file."""
    vm_id, _traces = stopped_with_traces(sp, b"version1")
    older = channel.export(vm_id)
    channel.bring(vm_id, sp.key(vm_id), older)
    run_on(sp, vm_id, b"version2")
    return vm_id, older, channel.export(vm_id)


def test_where_nobody_remembers_the_older_file_undoes_what_the_guest_wrote(sp: RunningSp) -> None:
    """The attack works in a secure processor that never saw the vTPM, for an owner who does not say what he saw."""
    with sp.channel() as channel, RunningSp(sp.state.with_name("elsewhere")) as elsewhere:
        vm_id, older, _newer = two_exports(sp, channel)
        with elsewhere.channel(sp.owner) as forgetful:
            forgetful.bring(vm_id, elsewhere.key(vm_id), older)
        elsewhere.info(messages.LaunchVm(vm_id=vm_id))
        assert find_traces(elsewhere, vm_id, start=True).nv == b"version1"


def test_an_older_file_is_refused_where_the_newer_one_was_made(sp: RunningSp) -> None:
    with sp.channel() as channel:
        vm_id, older, newer = two_exports(sp, channel)
        with pytest.raises(StaleInstance, match=r"is version 1 .* expected was 2 or newer"):
            channel.bring(vm_id, sp.key(vm_id), older)
    sp.kill()
    sp.start()
    with sp.channel() as channel:
        with pytest.raises(StaleInstance, match=r"is version 1 .* expected was 2 or newer"):
            channel.bring(vm_id, sp.key(vm_id), older)
        assert channel.bring(vm_id, sp.key(vm_id), newer).version == 2


def test_an_older_file_is_refused_everywhere_if_the_owner_says_what_he_saw(sp: RunningSp) -> None:
    with sp.channel() as channel, RunningSp(sp.state.with_name("elsewhere")) as elsewhere:
        vm_id, older, newer = two_exports(sp, channel)
        with elsewhere.channel(sp.owner) as careful:
            with pytest.raises(StaleInstance, match="expected was 2 or newer"):
                careful.bring(vm_id, elsewhere.key(vm_id), older, newest_version=2)
            assert careful.bring(vm_id, elsewhere.key(vm_id), newer, newest_version=2).version == 2


def test_a_file_that_was_imported_does_not_bring_the_vtpm_back_once_that_is_destroyed(sp: RunningSp) -> None:
    with sp.channel() as channel:
        vm_id, _traces = stopped_with_traces(sp)
        file = channel.export(vm_id)
        channel.bring(vm_id, sp.key(vm_id), file)
        run_on(sp, vm_id, b"moved on")
        channel.ask(DestroyVm(vm_id=vm_id), Done)
        with pytest.raises(StaleInstance, match="expected was 2 or newer"):
            channel.bring(vm_id, sp.key(vm_id), file)


def test_a_file_that_was_not_acknowledged_is_older_than_what_came_after_it(sp: RunningSp) -> None:
    with sp.channel() as channel:
        vm_id, _traces = stopped_with_traces(sp)
        _begins, kept = channel.take_export(vm_id)
        sp.info(messages.StartVm(vm_id=vm_id))
        sp.info(messages.StopVm(vm_id=vm_id))
        channel.export(vm_id)
        with pytest.raises(StaleInstance, match=r"is version 1 .* expected was 2 or newer"):
            channel.bring(vm_id, sp.key(vm_id), kept)


# The ledger


def test_a_full_bucket_forgets_what_left_first(tmp_path: Path) -> None:
    NvStore.create(tmp_path / "nv.db", bytes(32))
    store = NvStore(tmp_path / "nv.db", bytes(32))
    ledger = Ledger(store)
    ids = [uuid.UUID(int=number) for number in range(MAX_BUCKET_ENTRIES + 2)]
    entries = [Entry(bytes(32), "exported", number, number, bytes(32)) for number in range(len(ids))]
    for vtpm_id, entry in zip(ids, entries, strict=True):
        store.commit([ledger.change(vtpm_id, entry)]).result()
    assert [ledger.find(vtpm_id) for vtpm_id in ids] == [None, None, *entries[2:]]
    store.commit([ledger.change(ids[5], None)]).result()
    assert ledger.find(ids[5]) is None
    assert Ledger(store).find(ids[6]) == entries[6]
    store.close()
