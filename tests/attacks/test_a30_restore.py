"""A30: a restore, or a hibernation, used as a PCR reset under a running guest."""

from __future__ import annotations

import uuid

import pytest

from spvtpm.wire import messages
from spvtpm.wire.errors import AlreadyExists, InterfaceError, SpvtpmError, StaleInstance
from tests import tpm_commands as tpm
from tests.guests_view import PCR, find_traces, hibernated_with_traces, leave_traces
from tests.harness import RunningSp

pytestmark = pytest.mark.attack("A30")


def test_a_new_boot_does_reset_pcrs_and_the_guest_of_the_boot_before_is_cut_off(sp: RunningSp) -> None:
    """What the attack wants: PCRs back at zero. It costs the boot, whose frames are dead (A13)."""
    vm_id = sp.launch()
    leave_traces(sp, vm_id, b"measured")
    with sp.driver(vm_id) as running:
        sp.info(messages.ResetVm(vm_id=vm_id))
        with pytest.raises(InterfaceError):
            running.transmit(tpm.pcr_read(PCR))
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        assert tpm.pcr_in(driver.transmit(tpm.pcr_read(PCR))) == bytes(32)


def test_hibernating_and_going_on_resets_nothing_and_ends_the_running_guests_session(sp: RunningSp) -> None:
    vm_id = sp.launch()
    traces = leave_traces(sp, vm_id, b"measured")
    with sp.driver(vm_id) as running:
        sp.info(messages.HibernateVm(vm_id=vm_id))
        sp.info(messages.StartVm(vm_id=vm_id))
        with pytest.raises(InterfaceError):
            running.transmit(tpm.pcr_read(PCR))
    assert find_traces(sp, vm_id, start=False) == traces


def test_a_second_startup_in_a_resumed_boot_is_refused_by_the_tpm(sp: RunningSp) -> None:
    vm_id, traces = hibernated_with_traces(sp)
    sp.info(messages.StartVm(vm_id=vm_id))
    with sp.driver(vm_id) as driver:
        assert tpm.response_code(driver.transmit(tpm.startup())) == 0x100  # TPM_RC_INITIALIZE
    assert find_traces(sp, vm_id, start=False) == traces


def test_a_running_vms_vtpm_is_not_replaced_by_an_import(sp: RunningSp) -> None:
    vm_id, traces = hibernated_with_traces(sp)
    with sp.channel() as channel:
        begins, file = channel.take_export(vm_id)
        sp.info(messages.StartVm(vm_id=vm_id))
        for target, refusal in ((vm_id, AlreadyExists), (uuid.uuid4(), StaleInstance)):
            with pytest.raises(refusal):
                channel.bring(target, sp.key(vm_id), file)
        assert channel.fate(begins.vtpm_id).state == "here"
    assert find_traces(sp, vm_id, start=False) == traces


def test_a_hibernated_vm_cannot_be_stopped_or_reset_into_a_cold_boot(sp: RunningSp) -> None:
    vm_id, traces = hibernated_with_traces(sp)
    for request in (messages.StopVm(vm_id=vm_id), messages.ResetVm(vm_id=vm_id), messages.LaunchVm(vm_id=vm_id)):
        with pytest.raises(SpvtpmError):
            sp.call(request)
    sp.info(messages.StartVm(vm_id=vm_id))
    assert find_traces(sp, vm_id, start=False) == traces
