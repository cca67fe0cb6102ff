"""Commands on VMs that must be all or nothing: without an owner, without room, many at once, over a zygote that dies."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import (
    AlreadyExists,
    InterfaceError,
    NotFound,
    ResourceError,
    SpvtpmError,
    WorkerError,
    WrongState,
)
from spvtpm.wire.owner_messages import (
    DestroyVm,
    Done,
    ExportVtpm,
    ListMine,
    MyVms,
    OwnerRequest,
    RotateUserSecret,
)
from tests import tpm_commands as tpm
from tests.harness import RunningSp
from tests.owner import Owner
from tests.processor.processes import Doomed, descendants, full_disk, wait_until

NV_INDEX = 0x01500019


def listed(sp: RunningSp) -> list[uuid.UUID]:
    reply = sp.call(messages.ListVms())
    assert isinstance(reply, messages.VmList)
    return [vm.vm_id for vm in reply.vms]


def outcomes(attempts: Sequence[Callable[[], object]]) -> list[str]:
    """Runs all attempts at once; what became of each."""
    results: list[str] = []
    together = threading.Barrier(len(attempts))

    def run(attempt: Callable[[], object]) -> None:
        together.wait()
        try:
            attempt()
            results.append("done")
        except SpvtpmError as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=run, args=(attempt,)) for attempt in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results)


# All or nothing


@pytest.mark.claim("C2")
@pytest.mark.claim("C3")
def test_a_vm_that_no_owner_provisioned_gets_nothing_and_one_that_was_gets_a_vtpm_in_its_boot(sp: RunningSp) -> None:
    vm_id = uuid.uuid4()
    for unknown in (messages.LaunchVm, messages.CreateVtpm, messages.StartVm, messages.HibernateVm):
        with pytest.raises(NotFound):
            sp.call(unknown(vm_id=vm_id))
    assert listed(sp) == []
    assert not sp.interface(vm_id).exists()

    vm_id = sp.new_vm()
    for too_early in (messages.CreateVtpm, messages.StartVm, messages.ResetVm, messages.HibernateVm):
        with pytest.raises(WrongState):
            sp.call(too_early(vm_id=vm_id))
    assert (sp.vm(vm_id).state, sp.vm(vm_id).boots, sp.vm(vm_id).vtpm) == ("stopped", 0, None)
    assert not sp.interface(vm_id).exists()

    assert sp.info(messages.LaunchVm(vm_id=vm_id, with_vtpm=False)).vtpm is None
    assert sp.info(messages.CreateVtpm(vm_id=vm_id)).vtpm is not None


@pytest.mark.attack("A23")
def test_a_full_secure_processor_says_so_and_has_room_again_after_a_destruction(state_directory: Path) -> None:
    with RunningSp(state_directory, "max_vms = 3\n") as sp:
        vms = [sp.launch(), sp.launch(), sp.new_vm()]
        with sp.channel(Owner()) as channel, pytest.raises(ResourceError, match="3 VMs at most"):
            channel.provision(uuid.uuid4(), bytes(32))
        assert listed(sp) == sorted(vms)
        sp.destroy(vms[0])
        vms[0] = sp.launch()
        assert listed(sp) == sorted(vms)


@pytest.mark.attack("A23")
@pytest.mark.attack("A16")
def test_on_a_full_disk_nothing_is_made_half_and_the_same_command_works_once_there_is_room(sp: RunningSp) -> None:
    bare, new = sp.new_vm(), sp.new_vm()
    sp.call(messages.LaunchVm(vm_id=bare, with_vtpm=False))
    stopped, asleep, parked = sp.launch(), sp.launch(), sp.launch()
    sp.call(messages.StopVm(vm_id=stopped))
    sp.call(messages.HibernateVm(vm_id=asleep))
    sp.call(messages.ParkVtpm(vm_id=parked))
    refused: list[messages.Request] = [
        messages.LaunchVm(vm_id=new),
        messages.LaunchVm(vm_id=new, with_vtpm=False),
        messages.CreateVtpm(vm_id=bare),
        messages.StartVm(vm_id=stopped),
        messages.StartVm(vm_id=asleep),
        messages.HibernateVm(vm_id=parked),
    ]
    not_for_the_owner: list[OwnerRequest] = [
        sp.owner.provision(uuid.uuid4(), bytes(32)),
        ExportVtpm(vm_id=stopped),
        ExportVtpm(vm_id=asleep),
        DestroyVm(vm_id=bare),
        DestroyVm(vm_id=asleep),
        RotateUserSecret(user_secret=bytes(32)),
    ]
    before = sp.call(messages.ListVms())
    with full_disk(sp), sp.channel() as channel:
        for request in refused:
            with pytest.raises(ResourceError):
                sp.call(request)
            assert sp.call(messages.ListVms()) == before
            assert not sp.interface(new).exists()
        mine = channel.ask(ListMine(), MyVms)
        for asked in not_for_the_owner:
            with pytest.raises(ResourceError):
                channel.ask(asked, Done)
            assert channel.ask(ListMine(), MyVms) == mine
        assert sp.call(messages.ListVms()) == before

    for request in (refused[0], *refused[2:5]):
        vm = sp.info(request)
        assert (vm.state, vm.vtpm.residency if vm.vtpm else "") == ("running", "active")
    assert sp.info(refused[5]).state == "hibernated"
    sp.kill()
    sp.start()
    assert listed(sp) == sorted([bare, stopped, asleep, parked, new])


@pytest.mark.claim("C5")
@pytest.mark.attack("A23")
def test_a_guests_write_to_a_full_disk_is_not_acknowledged_and_nothing_earlier_is_lost(sp: RunningSp) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        tpm.checked(driver.transmit(tpm.nv_define(NV_INDEX, 8)))
        tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, b"earlier ")))
        with full_disk(sp):
            with pytest.raises(InterfaceError, match="could not be made durable"):
                driver.transmit(tpm.nv_write(NV_INDEX, b"too much"))
            with pytest.raises(WrongState, match="not durable yet"):
                sp.call(messages.ParkVtpm(vm_id=vm_id))
        tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, b"later on")))
    sp.kill()
    sp.start()
    sp.call(messages.StartVm(vm_id=vm_id))
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        assert tpm.nv_content_in(driver.transmit(tpm.nv_read(NV_INDEX, 8))) == b"later on"


# Many at once


@pytest.mark.attack("A10")
def test_of_many_commands_on_one_vm_at_once_one_is_carried_out(sp: RunningSp) -> None:
    vm_id, key = uuid.uuid4(), bytes(32)

    def provision() -> None:
        with sp.channel() as channel:
            channel.provision(vm_id, key)

    steps: list[tuple[Callable[[], object], type[SpvtpmError]]] = [
        (provision, AlreadyExists),
        (partial(sp.call, messages.LaunchVm(vm_id=vm_id, with_vtpm=False)), AlreadyExists),
        (partial(sp.call, messages.CreateVtpm(vm_id=vm_id)), AlreadyExists),
        (partial(sp.call, messages.ParkVtpm(vm_id=vm_id)), WrongState),
        (partial(sp.call, messages.WakeVtpm(vm_id=vm_id)), WrongState),
        (partial(sp.call, messages.StopVm(vm_id=vm_id)), WrongState),
        (partial(sp.call, messages.StartVm(vm_id=vm_id)), WrongState),
        (partial(sp.call, messages.HibernateVm(vm_id=vm_id)), WrongState),
        (partial(sp.call, messages.StartVm(vm_id=vm_id)), WrongState),
        (partial(sp.destroy, vm_id), NotFound),
    ]
    for number, (step, refusal) in enumerate(steps):
        assert outcomes([step] * 6) == sorted([refusal.__name__] * 5 + ["done"]), number


@pytest.mark.claim("C2")
@pytest.mark.attack("A30")
def test_vtpms_that_are_made_at_once_are_all_different(sp: RunningSp) -> None:
    vms = [sp.new_vm() for _ in range(12)]
    for batch in (vms[:6], vms[6:]):
        launches = [partial(sp.call, messages.LaunchVm(vm_id=vm_id)) for vm_id in batch]
        assert outcomes(launches) == ["done"] * 6

    keys, numbers, vtpms = set(), set(), set()
    for vm_id in vms:
        vtpm = sp.vm(vm_id).vtpm
        assert vtpm is not None
        vtpms.add(vtpm.vtpm_id)
        with sp.driver(vm_id) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            numbers.add(tpm.random_in(driver.transmit(tpm.get_random(16))))
            for hierarchy in (tpm.ENDORSEMENT, tpm.OWNER, tpm.PLATFORM):
                made = driver.transmit(tpm.create_primary(tpm.ecc_p256(), hierarchy))
                keys.add(tpm.public_in(made))
                tpm.checked(driver.transmit(tpm.flush_context(tpm.handle_in(made))))
    assert (len(vtpms), len(numbers), len(keys)) == (12, 12, 36)


# Parking by itself


def residency(sp: RunningSp, vm_id: uuid.UUID) -> str:
    vtpm = sp.vm(vm_id).vtpm
    return "" if vtpm is None else vtpm.residency


def test_an_idle_vtpm_is_parked_without_being_told_and_its_next_command_finds_it_as_it_was(
    state_directory: Path,
) -> None:
    with RunningSp(state_directory, "park_after_s = 0.05\n") as sp:
        vm_id = sp.launch()
        with sp.driver(vm_id) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            tpm.checked(driver.transmit(tpm.pcr_extend(16, bytes(range(32)))))
            pcr = tpm.pcr_in(driver.transmit(tpm.pcr_read(16)))
            for _ in range(3):
                wait_until(lambda: residency(sp, vm_id) == "parked")
                assert tpm.pcr_in(driver.transmit(tpm.pcr_read(16))) == pcr


# The zygote


@pytest.mark.attack("A22")
def test_a_zygote_that_dies_takes_its_workers_along_and_the_next_boots_have_a_new_one(sp: RunningSp) -> None:
    vms = [sp.launch() for _ in range(3)]
    parked = vms[2]
    with sp.driver(vms[0]) as one, sp.driver(vms[1]) as two, sp.driver(parked) as three:
        for driver in (one, two, three):
            tpm.checked(driver.transmit(tpm.startup()))
            tpm.checked(driver.transmit(tpm.nv_define(NV_INDEX, 8)))
            tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, b"survives")))
        tpm.checked(three.transmit(tpm.pcr_extend(16, bytes(range(32)))))
        pcr = tpm.pcr_in(three.transmit(tpm.pcr_read(16)))
        sp.call(messages.ParkVtpm(vm_id=parked))

        for member in [Doomed(pid) for pid in descendants(sp.process.pid)]:
            member.kill()
        wait_until(lambda: [sp.vm(vm_id).state for vm_id in vms] == ["failed", "failed", "running"])
        for driver in (one, two):
            with pytest.raises(InterfaceError, match="has failed"):
                driver.transmit(tpm.get_random(8))

        for vm_id in vms[:2]:
            wait_until(partial(boots, sp, vm_id))
        sp.call(messages.WakeVtpm(vm_id=parked))
        assert tpm.pcr_in(three.transmit(tpm.pcr_read(16))) == pcr
    for vm_id in vms[:2]:
        with sp.driver(vm_id) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            assert tpm.nv_content_in(driver.transmit(tpm.nv_read(NV_INDEX, 8))) == b"survives"


def boots(sp: RunningSp, vm_id: uuid.UUID) -> bool:
    """Whether a boot begins; false while the zygote is being started again."""
    request = messages.StartVm if sp.vm(vm_id).state == "stopped" else messages.ResetVm
    try:
        sp.call(request(vm_id=vm_id))
    except WorkerError:
        return False
    return True
