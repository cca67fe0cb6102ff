"""A09: the same file imported twice at once, or while its vTPM still lives. At most one succeeds."""

from __future__ import annotations

import threading
import uuid

import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import SpvtpmError, StaleInstance
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
