"""A10: one user's vTPM bound to another VM; two VMs pointed at one vTPM; a vTPM's interface handed to another VM."""

from __future__ import annotations

import socket
import uuid

import pytest

from spvtpm.embedded import VTPM
from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import messages
from spvtpm.wire.errors import AlreadyExists, InterfaceError, StateInUse
from tests import tpm_commands as tpm
from tests.attacks.memory_owner import start_command
from tests.harness import RunningSp

MEASUREMENT = bytes(32)


@pytest.mark.attack("A10")
def test_an_unprotected_tpm_socket_serves_whoever_is_pointed_at_it(vtpm: VTPM) -> None:
    path = vtpm.tcti.removeprefix("swtpm:path=")
    with socket.socket(socket.AF_UNIX) as another_vm:
        another_vm.connect(path)
        another_vm.sendall(tpm.pcr_extend(16, MEASUREMENT))
        tpm.checked(another_vm.recv(4096))

    assert tpm.pcr_in(vtpm.transmit(tpm.pcr_read(16))) != bytes(32)


@pytest.mark.attack("A10")
@pytest.mark.claim("C2")
def test_another_vm_that_is_handed_the_interface_can_execute_nothing(sp: RunningSp) -> None:
    victim, other = sp.launch(), sp.launch()
    with sp.driver(victim) as driver:
        tpm.checked(driver.transmit(tpm.startup()))

    with InterfaceMemory.connect(sp.interface(victim)) as handed_over:
        thief = CrbDriver(handed_over, sp.key(other))
        with pytest.raises(InterfaceError, match="not authentic"):
            thief.transmit(tpm.pcr_extend(16, MEASUREMENT))

    with sp.driver(victim) as driver:
        assert tpm.pcr_in(driver.transmit(tpm.pcr_read(16))) == bytes(32)
    assert "NOT_AUTHENTIC" in sp.log()


@pytest.mark.attack("A10")
@pytest.mark.claim("C2")
def test_two_processes_never_hold_one_interface_at_a_time(sp: RunningSp) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        with pytest.raises(StateInUse, match="another process holds"):
            InterfaceMemory.connect(sp.interface(vm_id), timeout_s=0.3)
        tpm.checked(driver.transmit(tpm.get_random(8)))


@pytest.mark.attack("A10")
@pytest.mark.claim("C2")
def test_a_bound_vm_gets_no_second_vtpm_and_its_binding_survives_a_restart(sp: RunningSp) -> None:
    vm_id = sp.launch()
    bound = sp.vm(vm_id).vtpm
    for request in (messages.LaunchVm(vm_id=vm_id), messages.CreateVtpm(vm_id=vm_id)):
        with pytest.raises(AlreadyExists):
            sp.call(request)

    sp.kill()
    sp.start()
    after = sp.info(messages.StartVm(vm_id=vm_id)).vtpm

    assert bound is not None
    assert after is not None
    assert after.vtpm_id == bound.vtpm_id


@pytest.mark.attack("A10")
def test_one_key_for_two_vms_still_gives_them_different_frames(sp: RunningSp) -> None:
    first, second = sp.launch(), uuid.uuid4()
    with sp.channel() as channel:
        channel.provision(second, sp.key(first))
    sp.info(messages.LaunchVm(vm_id=second))

    with InterfaceMemory.connect(sp.interface(first)) as interface:
        driver = CrbDriver(interface, sp.key(first))
        tpm.checked(driver.transmit(tpm.startup()))
        frame = interface.memory[0x2000:0x3000]
    with InterfaceMemory.connect(sp.interface(second)) as interface:
        driver = CrbDriver(interface, sp.key(first))
        interface.memory[0x2000:0x3000] = frame
        assert start_command(interface).name == "NOT_AUTHENTIC"
        assert tpm.response_code(driver.transmit(tpm.get_random(8))) == tpm.RC_INITIALIZE
