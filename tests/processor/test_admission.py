"""Which VMs may be provisioned: those announced, where that is wanted, and only so many of one owner (A23)."""

from __future__ import annotations

import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from spvtpm.processor.admission import MAX_ADMITTED, Admission
from spvtpm.wire.errors import NotAdmitted, TooMany, error_from_code
from spvtpm.wire.messages import Admitted, AdmitVm, ErrorReply
from spvtpm.wire.owner_messages import MyVm
from tests.harness import RunningSp
from tests.owner import Owner


def provision(sp: RunningSp, vm_id: uuid.UUID, owner: Owner | None = None) -> None:
    owner = owner or sp.owner
    with sp.channel(owner) as channel:
        channel.say(owner.provision(vm_id, bytes(32)))
        reply = channel.hear()
    if isinstance(reply, ErrorReply):
        raise error_from_code(reply.code, reply.message)
    assert isinstance(reply, MyVm)


@pytest.mark.attack("A23")
def test_where_it_is_required_only_announced_vms_come_once_each() -> None:
    with (
        TemporaryDirectory(prefix="spvtpm-") as path,
        RunningSp(Path(path) / "sp", config="admission_required = true\n") as sp,
    ):
        vm_id = uuid.uuid4()
        with pytest.raises(NotAdmitted):
            provision(sp, vm_id)
        assert [sp.call(AdmitVm(vm_id=vm_id)), sp.call(AdmitVm(vm_id=vm_id))] == [Admitted(), Admitted()]
        provision(sp, vm_id)
        sp.destroy(vm_id)
        with pytest.raises(NotAdmitted):
            provision(sp, vm_id)


@pytest.mark.attack("A23")
def test_one_owner_cannot_take_all_the_room() -> None:
    with (
        TemporaryDirectory(prefix="spvtpm-") as path,
        RunningSp(Path(path) / "sp", config="max_vms_of_one_owner = 2\n") as sp,
    ):
        for _ in range(2):
            provision(sp, uuid.uuid4())
        with pytest.raises(TooMany):
            provision(sp, uuid.uuid4())
        provision(sp, uuid.uuid4(), Owner())


def test_announcements_are_bounded_the_oldest_goes_first() -> None:
    admission = Admission(10, 10, is_required=True)
    first, *others = (uuid.uuid4() for _ in range(MAX_ADMITTED + 1))
    for vm_id in (first, *others):
        admission.admit(vm_id)
    admission.check(others[0])
    with pytest.raises(NotAdmitted):
        admission.check(first)
