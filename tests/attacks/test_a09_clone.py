"""A09: the same file imported twice at once, or while its vTPM still lives. At most one succeeds."""

from __future__ import annotations

import sqlite3
import threading
import uuid
from contextlib import closing

import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import IntegrityError, SpvtpmError, StaleInstance
from spvtpm.wire.instance_file import parse_instance_header
from spvtpm.wire.owner_messages import AskFate, Fate
from tests.guests_view import find_traces, stopped_with_traces
from tests.harness import RunningSp

pytestmark = [pytest.mark.attack("A09"), pytest.mark.claim("B3")]


def test_in_two_secure_processors_a_file_makes_two_vtpms_with_one_identity(sp: RunningSp) -> None:
    """The attack on the unprotected value: nothing in the file itself hinders it. The owner's memory does (tests/terminal)."""
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel, RunningSp(sp.state.with_name("elsewhere")) as elsewhere:
        file = channel.export(vm_id)
        identities = set()
        for place in (sp, elsewhere):
            with place.channel(sp.owner) as forgetful:
                forgetful.bring(vm_id, place.key(vm_id), file)
            place.info(messages.LaunchVm(vm_id=vm_id))
            identities.add(find_traces(place, vm_id, start=True).identity)
        assert len(identities) == 1


def test_a_file_is_refused_while_its_vtpm_lives(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        _begins, file = channel.take_export(vm_id)
        with pytest.raises(StaleInstance, match="lives in this secure processor"):
            channel.bring(uuid.uuid4(), bytes(32), file)
        sp.info(messages.StartVm(vm_id=vm_id))
        with pytest.raises(StaleInstance, match="lives in this secure processor"):
            channel.bring(uuid.uuid4(), bytes(32), file)


def test_a_vtpm_whose_block_is_damaged_for_a_while_is_never_said_to_be_unknown(sp: RunningSp) -> None:
    """An owner who has missed the answer to his import asks. If he were told that it never came, he would import elsewhere."""
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        file = channel.export(vm_id)
        channel.bring(vm_id, sp.key(vm_id), file)
    vtpm_id = parse_instance_header(file).vtpm_id
    sp.stop()
    with closing(sqlite3.connect(sp.state / "nv.db")) as database, database:
        row = f"vmsb/{vm_id}"
        (genuine,) = database.execute("SELECT sealed FROM records WHERE name = ?", (row,)).fetchone()
        database.execute("UPDATE records SET sealed = ? WHERE name = ?", (genuine[:-1] + b"?", row))
    sp.start()
    with sp.channel() as channel, pytest.raises(IntegrityError, match="is here"):
        channel.ask(AskFate(vtpm_id=vtpm_id), Fate)
    with sp.channel() as channel:
        assert channel.ask(AskFate(vtpm_id=uuid.uuid4()), Fate).state == "unknown"
    sp.stop()
    with closing(sqlite3.connect(sp.state / "nv.db")) as database, database:
        database.execute("UPDATE records SET sealed = ? WHERE name = ?", (genuine, row))
    sp.start()
    sp.info(messages.LaunchVm(vm_id=vm_id))


def test_of_many_imports_of_one_file_at_once_one_succeeds(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        file = channel.export(vm_id)
    made: list[uuid.UUID] = []
    refused: list[SpvtpmError] = []
    together = threading.Barrier(6)

    def bring() -> None:
        target = uuid.uuid4()
        with sp.channel() as channel:
            together.wait()
            try:
                made.append(channel.bring(target, bytes(32), file).vm_id)
            except StaleInstance as error:
                refused.append(error)

    threads = [threading.Thread(target=bring) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 5)
    assert [vm.vm_id for vm in sp.vms()] == made
