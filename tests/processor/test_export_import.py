"""A vTPM leaves as a file and comes back: whole, in another secure processor too, and after a power cut."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import (
    AlreadyExists,
    ChipNotAllowed,
    ExportSuperseded,
    FirmwareTooOld,
    InstanceFileError,
    IntegrityError,
    MessageError,
    NotFound,
    ResourceError,
    StaleInstance,
    WrongInstanceKeys,
    WrongState,
)
from spvtpm.wire.instance_file import parse_instance_header
from spvtpm.wire.owner_messages import (
    PAGE_MY_VMS,
    AcknowledgeExport,
    Done,
    ExportVtpm,
    Fate,
    ImportVtpm,
    ListMine,
    MyVm,
    MyVms,
    Piece,
    ReadEvents,
    Rotated,
    RotateUserSecret,
)
from spvtpm.wire.owner_messages import Events as EventsReply
from tests import tpm_commands as tpm
from tests.guests_view import find_traces, hibernated_with_traces, leave_traces, stopped_with_traces
from tests.harness import RunningSp
from tests.owner import ANYTHING, Owner
from tests.papers import new_papers, todays_papers
from tests.processor.processes import Doomed, full_disk, wait_until


@pytest.fixture
def other_sp(state_directory: Path) -> Iterator[RunningSp]:
    """Another secure processor of the same fleet, with the same owner to come."""
    with RunningSp(state_directory.with_name("other")) as running:
        yield running


# There and back


@pytest.mark.claim("C6a")
@pytest.mark.claim("C6b")
@pytest.mark.claim("C4")
def test_a_stopped_vtpm_leaves_whole_and_starts_in_another_secure_processor(sp: RunningSp, other_sp: RunningSp) -> None:
    vm_id, traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        file = channel.export(vm_id)
    assert sp.vms() == []

    with other_sp.channel(sp.owner) as channel:
        vm = channel.bring(vm_id, other_sp.key(vm_id), file)
        assert (vm.state, vm.boots, vm.version) == ("stopped", 0, 1)
    other_sp.info(messages.LaunchVm(vm_id=vm_id))
    assert find_traces(other_sp, vm_id, start=True) == replace(traces, pcr=bytes(32))


@pytest.mark.claim("C6b")
def test_a_hibernated_vtpm_goes_on_elsewhere_where_it_was_with_objects_and_sessions(
    sp: RunningSp, other_sp: RunningSp
) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        made = driver.transmit(tpm.create_primary(tpm.ecc_p256()))
        handle, public = tpm.handle_in(made), tpm.public_in(made)
    traces = leave_traces(sp, vm_id, b"asleep !", start=False)
    sp.info(messages.HibernateVm(vm_id=vm_id))
    with sp.channel() as channel:
        file = channel.export(vm_id)
    assert parse_instance_header(file).hibernated

    with other_sp.channel(sp.owner) as channel:
        assert channel.bring(vm_id, other_sp.key(vm_id), file).state == "hibernated"
    other_sp.info(messages.LaunchVm(vm_id=vm_id))
    assert find_traces(other_sp, vm_id, start=False) == traces
    with other_sp.driver(vm_id) as driver:
        assert public in driver.transmit(tpm.read_public(handle))


@pytest.mark.claim("C6b")
def test_a_hibernated_vm_goes_on_in_its_own_secure_processor_over_a_restart_of_that(sp: RunningSp) -> None:
    vm_id, traces = hibernated_with_traces(sp)
    sp.kill()
    sp.start()
    assert sp.vm(vm_id).state == "hibernated"
    sp.info(messages.StartVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=False) == traces


@pytest.mark.claim("C6c")
def test_after_a_power_cut_the_owner_exports_from_nv_and_goes_on_elsewhere(sp: RunningSp, other_sp: RunningSp) -> None:
    vm_id = sp.launch()
    traces = leave_traces(sp, vm_id, b"powercut")
    sp.kill()  # host power loss, with the VM running
    sp.start()
    with sp.channel() as channel:
        file = channel.export(vm_id)
    with other_sp.channel(sp.owner) as channel:
        channel.bring(vm_id, other_sp.key(vm_id), file)
    other_sp.info(messages.LaunchVm(vm_id=vm_id))
    assert find_traces(other_sp, vm_id, start=True) == replace(traces, pcr=bytes(32))


@pytest.mark.claim("C6a")
def test_a_vtpm_may_come_back_for_another_vm_of_its_owner(sp: RunningSp) -> None:
    vm_id, traces = stopped_with_traces(sp)
    next_vm = uuid.uuid4()
    with sp.channel() as channel:
        channel.bring(next_vm, sp.key(next_vm), channel.export(vm_id))
    sp.info(messages.LaunchVm(vm_id=next_vm))
    assert find_traces(sp, next_vm, start=True).identity == traces.identity


@pytest.mark.claim("C6b")
def test_an_export_destroys_nothing_until_it_is_acknowledged_and_can_be_asked_for_again(sp: RunningSp) -> None:
    vm_id, traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        channel.take_export(vm_id)
    with sp.channel() as channel:
        begins, _file = channel.take_export(vm_id)
        assert begins.version == 2, "no two files have one version"
    sp.info(messages.StartVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=True).nv == traces.nv


# Acknowledged


def test_an_acknowledgement_of_another_file_destroys_nothing(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        with pytest.raises(ExportSuperseded, match="no file"):
            channel.ask(AcknowledgeExport(vm_id=vm_id, version=0, sha256=bytes(32)), Fate)
        begins, file = channel.take_export(vm_id)
        with pytest.raises(ExportSuperseded, match="no file"):
            channel.acknowledge(vm_id, begins, file[:-1])
        with pytest.raises(ExportSuperseded, match="no file"):
            channel.acknowledge(vm_id, msgspec.structs.replace(begins, version=7), file)
        assert channel.fate(begins.vtpm_id).state == "here"
        assert channel.acknowledge(vm_id, begins, file).state == "exported"
        with pytest.raises(NotFound):
            channel.acknowledge(vm_id, begins, file)


@pytest.mark.claim("B3")
@pytest.mark.attack("A08")
def test_a_vm_that_was_started_since_has_made_the_file_void(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        begins, file = channel.take_export(vm_id)
        sp.info(messages.StartVm(vm_id=vm_id))
        with pytest.raises(ExportSuperseded, match="since"):
            channel.acknowledge(vm_id, begins, file)
        sp.info(messages.StopVm(vm_id=vm_id))
        with pytest.raises(ExportSuperseded, match="since"):
            channel.acknowledge(vm_id, begins, file)
        assert len(channel.export(vm_id)) > 0


@pytest.mark.attack("A16")
def test_an_owner_who_missed_the_answer_learns_the_fate(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        begins, file = channel.take_export(vm_id)
        acknowledged = channel.acknowledge(vm_id, begins, file)
    sp.kill()
    sp.start()
    with sp.channel() as channel:
        assert channel.fate(begins.vtpm_id) == acknowledged
        channel.bring(vm_id, sp.key(vm_id), file)
        assert channel.fate(begins.vtpm_id).state == "here"
    with sp.channel(Owner()) as channel:
        assert channel.fate(begins.vtpm_id).state == "unknown"


@pytest.mark.attack("A16")
def test_a_start_that_could_not_be_made_durable_has_made_the_file_void_too(sp: RunningSp) -> None:
    """A guest may have run for a moment, and written."""
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        begins, file = channel.take_export(vm_id)
        with full_disk(sp), pytest.raises(ResourceError):
            sp.call(messages.StartVm(vm_id=vm_id))
        with pytest.raises(ExportSuperseded, match="since"):
            channel.acknowledge(vm_id, begins, file)
        assert channel.fate(begins.vtpm_id).state == "here"


# Refused


def test_a_running_or_failed_vm_and_one_without_a_vtpm_are_not_exported(sp: RunningSp) -> None:
    running, bare = sp.launch(), sp.new_vm()
    with sp.channel() as channel:
        with pytest.raises(WrongState, match="running"):
            channel.ask(ExportVtpm(vm_id=running), Done)
        with pytest.raises(WrongState, match="no vTPM"):
            channel.ask(ExportVtpm(vm_id=bare), Done)


@pytest.mark.attack("A07")
def test_another_users_secret_and_another_fleet_do_not_open_the_file(sp: RunningSp, tmp_path: Path) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        file = channel.export(vm_id)
    thief = Owner(sp.owner.key)  # even with the owner's key: not with his secret
    with sp.channel(thief) as channel, pytest.raises(WrongInstanceKeys):
        channel.bring(vm_id, sp.key(vm_id), file)
    strangers = new_papers("Other Silicon", start=todays_papers().root.certificate.not_valid_before_utc)
    with (
        RunningSp(sp.state.with_name("foreign"), vendor=strangers) as foreign,
        foreign.channel(sp.owner) as channel,
        pytest.raises(WrongInstanceKeys, match="fleet"),
    ):
        channel.bring(vm_id, sp.key(vm_id), file)
    with sp.channel() as channel:
        assert channel.bring(vm_id, sp.key(vm_id), file).version == 1


@pytest.mark.claim("B5")
def test_a_policy_that_does_not_allow_this_chip_or_firmware_is_refused(sp: RunningSp) -> None:
    vm_id = uuid.uuid4()
    elsewhere = msgspec.structs.replace(ANYTHING, chips=frozenset({bytes(16)}))
    newer = msgspec.structs.replace(ANYTHING, minimum_firmware=1 << 31)
    with sp.channel() as channel:
        with pytest.raises(ChipNotAllowed, match="policy"):
            channel.provision(vm_id, bytes(32), elsewhere)
        with pytest.raises(FirmwareTooOld, match="policy"):
            channel.provision(vm_id, bytes(32), newer)
        assert channel.ask(ListMine(), MyVms).vms == []


@pytest.mark.claim("B5")
@pytest.mark.attack("A26")
def test_a_vtpm_does_not_boot_on_firmware_that_was_put_back(sp: RunningSp) -> None:
    vm_id, unlaunched = (sp.new_vm(msgspec.structs.replace(ANYTHING, minimum_firmware=1)) for _ in range(2))
    sp.info(messages.LaunchVm(vm_id=vm_id))
    sp.stop()
    sp.start(firmware=0)
    for request in (messages.StartVm(vm_id=vm_id), messages.LaunchVm(vm_id=unlaunched)):
        with pytest.raises(FirmwareTooOld, match="asks for firmware 1; this is 0"):
            sp.call(request)
    sp.stop()
    sp.start()
    assert sp.info(messages.StartVm(vm_id=vm_id)).state == "running"


@pytest.mark.claim("B5")
def test_the_policy_goes_with_the_file_and_binds_every_chip(sp: RunningSp, other_sp: RunningSp) -> None:
    status = sp.call(messages.GetStatus())
    assert isinstance(status, messages.Status)
    only_here = msgspec.structs.replace(ANYTHING, chips=frozenset({bytes.fromhex(status.chip_id)}))
    vm_id = sp.new_vm(only_here)
    sp.info(messages.LaunchVm(vm_id=vm_id))
    sp.info(messages.StopVm(vm_id=vm_id))
    with sp.channel() as channel:
        file = channel.export(vm_id)
    with other_sp.channel(sp.owner) as channel, pytest.raises(ChipNotAllowed):
        channel.bring(vm_id, bytes(32), file)
    with sp.channel() as channel:
        assert channel.bring(vm_id, sp.key(vm_id), file).policy == only_here


@pytest.mark.attack("A06")
def test_a_damaged_file_makes_nothing_and_the_channel_goes_on(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        file = channel.export(vm_id)
        for at in (0, 9, 100, 200, len(file) - 1):
            damaged = bytearray(file)
            damaged[at] ^= 1
            with pytest.raises((InstanceFileError, WrongInstanceKeys)):
                channel.bring(vm_id, sp.key(vm_id), bytes(damaged))
        announced = ImportVtpm(size_bytes=len(file) - 1, newest_version=0)
        channel.ask(channel.owner.provision(vm_id, sp.key(vm_id), announced), Done)
        with pytest.raises(InstanceFileError, match="longer"):
            channel.ask(Piece(data=file), MyVm)
        with pytest.raises(MessageError, match="no import"):
            channel.ask(Piece(data=file), MyVm)
        assert channel.ask(ListMine(), MyVms).vms == []
        assert channel.bring(vm_id, sp.key(vm_id), file).version == 1


@pytest.mark.claim("C3")
def test_a_vm_with_an_imported_vtpm_is_not_launched_without_it(sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        channel.bring(vm_id, sp.key(vm_id), channel.export(vm_id))
    with pytest.raises(WrongState, match="imported"):
        sp.call(messages.LaunchVm(vm_id=vm_id, with_vtpm=False))
    assert sp.info(messages.LaunchVm(vm_id=vm_id)).state == "running"


def test_no_room_is_told_before_a_byte_of_the_file_is_taken(state_directory: Path) -> None:
    with RunningSp(state_directory, "max_vms = 1\n") as sp:
        vm_id, _traces = stopped_with_traces(sp)
        with sp.channel() as channel:
            _begins, file = channel.take_export(vm_id)
            with pytest.raises(ResourceError, match="1 VMs at most"):
                channel.bring(uuid.uuid4(), bytes(32), file)
            with pytest.raises(AlreadyExists):
                channel.bring(vm_id, bytes(32), file)


@contextmanager
def counter_out_of_order(sp: RunningSp) -> Iterator[None]:
    """The chip's counter does not answer, so that milestones wait."""
    counter = sp.state / "fuses" / "counter"
    hidden = counter.rename(counter.with_suffix(".hidden"))
    try:
        yield
    finally:
        hidden.rename(counter)


@pytest.mark.attack("A16")
def test_nobody_sees_a_vm_before_it_is_durable_and_everybody_else_is_answered(sp: RunningSp) -> None:
    other, (vm_id, _traces) = sp.launch(), stopped_with_traces(sp)
    with sp.channel() as channel, sp.channel() as another, ThreadPoolExecutor(1) as pool:
        file = channel.export(vm_id)
        with counter_out_of_order(sp):
            coming = pool.submit(channel.bring, vm_id, sp.key(vm_id), file)
            wait_until(lambda: "counter does not answer" in sp.log())
            assert [vm.vm_id for vm in sp.vms()] == [other]
            assert [vm.vm_id for vm in another.ask(ListMine(), MyVms).vms] == [other]
            with pytest.raises(AlreadyExists):
                another.bring(vm_id, sp.key(vm_id), file)
        assert coming.result(60).version == 1
        assert {vm.vm_id for vm in sp.vms()} == {other, vm_id}


# The owner's other commands


def test_a_vm_that_fails_while_its_secret_is_rotated_has_failed(sp: RunningSp) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver, sp.channel() as channel, ThreadPoolExecutor(1) as pool:
        tpm.checked(driver.transmit(tpm.startup()))
        channel.ask(ListMine(), MyVms)
        with counter_out_of_order(sp):
            rotated = pool.submit(channel.ask, RotateUserSecret(user_secret=bytes(32)), Rotated)
            wait_until(lambda: "counter does not answer" in sp.log())
            Doomed(sp.worker_of(driver.interface)).kill()
            wait_until(lambda: sp.vm(vm_id).state == "failed")
        assert rotated.result(60).vms == 1
        assert sp.vm(vm_id).state == "failed"
    sp.info(messages.StopVm(vm_id=vm_id))
    with sp.channel(Owner(sp.owner.key, bytes(32))) as channel:
        file = channel.export(vm_id)
        assert channel.bring(vm_id, sp.key(vm_id), file).version == 1


@pytest.mark.claim("C6b")
@pytest.mark.attack("A15")
def test_a_hibernated_vm_that_cannot_go_on_is_hibernated_still_and_goes_on_once_that_is_put_right(
    sp: RunningSp,
) -> None:
    vm_id, traces = hibernated_with_traces(sp)
    vtpm = sp.vm(vm_id).vtpm
    assert vtpm is not None
    name = f"vtpm/{vtpm.vtpm_id}"
    with closing(sqlite3.connect(sp.state / "nv.db")) as database:
        (kept,) = database.execute("SELECT sealed FROM records WHERE name = ?", (name,)).fetchone()
        for sealed in (bytes(5000), kept):
            with database:
                database.execute("UPDATE records SET sealed = ? WHERE name = ?", (sealed, name))
            if sealed is not kept:
                with pytest.raises(IntegrityError, match=name):
                    sp.info(messages.StartVm(vm_id=vm_id))
                assert sp.vm(vm_id).state == "hibernated"
    sp.info(messages.StartVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=False) == traces


def test_a_new_secret_is_that_of_all_the_owners_vms_and_opens_what_is_exported_from_then_on(sp: RunningSp) -> None:
    (one, _), (two, _) = stopped_with_traces(sp), stopped_with_traces(sp)
    renewed = Owner(sp.owner.key)
    with sp.channel() as channel:
        assert channel.ask(RotateUserSecret(user_secret=renewed.user_secret), Rotated).vms == 2
    sp.kill()
    sp.start()
    with sp.channel(renewed) as channel:
        for vm_id in (one, two):
            file = channel.export(vm_id)
            assert channel.bring(vm_id, sp.key(vm_id), file).version == 1
    with sp.channel() as channel, pytest.raises(WrongInstanceKeys):
        channel.bring(two, sp.key(two), channel.export(two))


def test_an_owner_lists_all_his_vms_page_by_page_and_nobody_elses(sp: RunningSp) -> None:
    mine = sorted(sp.new_vm() for _ in range(PAGE_MY_VMS + 6))
    with sp.channel(Owner()) as channel:
        channel.provision(uuid.uuid4(), bytes(32))
        assert len(channel.ask(ListMine(), MyVms).vms) == 1
    with sp.channel() as channel:
        first = channel.ask(ListMine(), MyVms)
        second = channel.ask(ListMine(after=first.vms[-1].vm_id), MyVms)
    assert [vm.vm_id for vm in (*first.vms, *second.vms)] == mine
    assert (first.more, second.more) == (True, False)


def test_the_owner_reads_what_happened_to_a_vm(sp: RunningSp) -> None:
    vm_id = sp.launch()
    for request in (messages.ResetVm, messages.HibernateVm, messages.StartVm, messages.StopVm):
        sp.info(request(vm_id=vm_id))
    sp.kill()
    sp.start()
    sp.info(messages.StartVm(vm_id=vm_id))
    with sp.channel() as channel:
        events = channel.ask(ReadEvents(vm_id=vm_id), EventsReply).events
    words = [event.what for event in events]
    assert words == ["provisioned", "launched", "stopped", "started", "hibernated", "resumed", "stopped", "started"]


def test_the_events_of_a_vm_are_the_newest_ones(sp: RunningSp) -> None:
    vm_id = sp.launch()
    for _ in range(20):
        sp.info(messages.ResetVm(vm_id=vm_id))
    with sp.channel() as channel:
        events = channel.ask(ReadEvents(vm_id=vm_id), EventsReply).events
    assert len(events) == 32
    assert (events[-1].what, events[-1].detail) == ("started", "boot 21")


@pytest.mark.claim("B3")
def test_a_file_older_than_the_owner_remembers_is_refused_by_version(sp: RunningSp, other_sp: RunningSp) -> None:
    vm_id, _traces = stopped_with_traces(sp)
    with sp.channel() as channel:
        file = channel.export(vm_id)
    with other_sp.channel(sp.owner) as channel:
        with pytest.raises(StaleInstance, match=r"is version 1 .* expected was 2 or newer"):
            channel.bring(vm_id, bytes(32), file, newest_version=2)
        assert channel.bring(vm_id, bytes(32), file, newest_version=1).version == 1
