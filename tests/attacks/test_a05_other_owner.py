"""A05: another user names this user's VM. The answer is that of a VM that does not exist, to the letter."""

from __future__ import annotations

import uuid

import pytest

from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.owner_messages import (
    AcknowledgeExport,
    AskFate,
    DestroyVm,
    ExportVtpm,
    Fate,
    ListMine,
    MyVms,
    OwnerRequest,
    ReadEvents,
)
from tests.guests_view import stopped_with_traces
from tests.harness import RunningSp
from tests.owner import Owner, OwnerChannel

pytestmark = pytest.mark.attack("A05")


def about(vm_id: uuid.UUID) -> list[OwnerRequest]:
    """Every request that names a VM."""
    return [
        ExportVtpm(vm_id=vm_id),
        AcknowledgeExport(vm_id=vm_id, version=1, sha256=bytes(32)),
        DestroyVm(vm_id=vm_id),
        ReadEvents(vm_id=vm_id),
    ]


def refusal(channel: OwnerChannel, request: OwnerRequest, vm_id: uuid.UUID) -> tuple[str, str]:
    """Code and sentence, without the id that was asked for."""
    with pytest.raises(SpvtpmError) as refused:
        channel.ask(request, Fate)
    return refused.value.code, str(refused.value).replace(str(vm_id), "ID")


def test_another_users_vm_is_as_one_that_does_not_exist(sp: RunningSp) -> None:
    there, _traces = stopped_with_traces(sp)
    nowhere = uuid.uuid4()
    with sp.channel(Owner()) as stranger:
        for asked, unknown in zip(about(there), about(nowhere), strict=True):
            assert refusal(stranger, asked, there) == refusal(stranger, unknown, nowhere)
        assert stranger.ask(ListMine(), MyVms).vms == []


def test_another_users_vtpm_has_no_fate(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel, sp.channel(Owner()) as stranger:
        begins, file = channel.take_export(vm_id)
        for _ in range(2):  # while it is here, and when it is gone
            fate = stranger.ask(AskFate(vtpm_id=begins.vtpm_id), Fate)
            assert fate == Fate(vtpm_id=begins.vtpm_id, state="unknown", version=0)
            if channel.fate(begins.vtpm_id).state == "here":
                channel.acknowledge(vm_id, begins, file)


def test_the_owner_himself_is_answered(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        assert len(channel.ask(ListMine(), MyVms).vms) == 1
        assert channel.export(vm_id)
