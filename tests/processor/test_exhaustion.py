"""What runs out, breaks off or hangs in the secure processor: a typed error, nothing left over, and the next command works."""

from __future__ import annotations

import os
import resource
import signal
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from spvtpm.guest.crb_driver import CrbDriver, Interface
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.processor.hypervisor_port import MAX_CONNECTIONS
from spvtpm.wire import messages
from spvtpm.wire.errors import InterfaceError, NotFound, ResourceError, SpvtpmError, WrongState
from tests import tpm_commands as tpm
from tests.harness import RunningSp
from tests.processor.processes import full_disk, wait_until


@pytest.mark.attack("A23")
def test_without_descriptors_a_launch_is_refused_as_such_and_works_once_there_are_some(sp: RunningSp) -> None:
    first, vms = sp.launch(), [sp.new_vm() for _ in range(16)]
    limits = resource.prlimit(sp.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(sp.process.pid, resource.RLIMIT_NOFILE, (64, limits[1]))
    refused = []
    with SecureProcessorClient(sp.socket) as client:
        for vm_id in vms:
            try:
                client.call(messages.LaunchVm(vm_id=vm_id))
            except ResourceError as error:
                refused.append(error)
        resource.prlimit(sp.process.pid, resource.RLIMIT_NOFILE, limits)
        reply = client.call(messages.LaunchVm(vm_id=sp.new_vm()))

    assert refused
    assert isinstance(reply, messages.VmInfo)
    assert "met a defect" not in sp.log()
    with sp.driver(first) as driver:
        tpm.checked(driver.transmit(tpm.startup()))


@pytest.mark.attack("A23")
def test_a_burst_of_hypervisor_connections_waits_its_turn(sp: RunningSp) -> None:
    sp.process.send_signal(signal.SIGSTOP)
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(SecureProcessorClient(sp.socket)) for _ in range(MAX_CONNECTIONS // 2)]
            sp.process.send_signal(signal.SIGCONT)
            assert all(isinstance(client.call(messages.ListVms()), messages.VmList) for client in clients)
    finally:
        sp.process.send_signal(signal.SIGCONT)


@pytest.mark.attack("A25")
def test_a_peer_that_sends_nonsense_and_goes_leaves_one_line_in_the_log(sp: RunningSp) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(sp.socket))
            peer.sendall(b"\xff" * 8)
    sp.call(messages.GetStatus())

    assert "Traceback" not in sp.log()


@pytest.mark.attack("A23")
def test_unknown_vms_leave_nothing_behind(sp: RunningSp) -> None:
    def resident_kib() -> int:
        with open(f"/proc/{sp.process.pid}/status") as status:  # noqa: PTH123
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def ask(count: int) -> None:
        with SecureProcessorClient(sp.socket) as client:
            for _ in range(count):
                with pytest.raises(NotFound):
                    client.call(messages.StopVm(vm_id=uuid.uuid4()))

    ask(500)
    before = resident_kib()
    ask(8000)
    assert resident_kib() - before < 500, "a lock for each would be 2,000 KiB"


@pytest.mark.claim("C1")
def test_a_reset_that_fails_takes_the_interface_away_at_once(sp: RunningSp) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        with full_disk(sp):
            with pytest.raises(ResourceError):
                sp.info(messages.ResetVm(vm_id=vm_id))
            with pytest.raises(InterfaceError, match=r"powered off|has closed"):
                driver.transmit(tpm.get_random(8), timeout_s=20)
    assert sp.info(messages.StartVm(vm_id=vm_id)).state == "running"
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))


@pytest.mark.attack("A13")
def test_a_driver_that_lived_through_a_reset_is_told(sp: RunningSp) -> None:
    vm_id = sp.launch()
    with InterfaceMemory.connect(sp.interface(vm_id)) as interface:
        driver = CrbDriver(interface, sp.key(vm_id))
        tpm.checked(driver.transmit(tpm.startup()))
        sp.info(messages.ResetVm(vm_id=vm_id))
        with pytest.raises(InterfaceError, match="powered on anew"):
            driver.transmit(tpm.get_random(8))


@pytest.mark.attack("A21")
def test_a_guest_always_learns_that_its_vtpm_died_whatever_the_moment(sp: RunningSp) -> None:
    vm_id = sp.launch()
    for _ in range(60):
        with sp.driver(vm_id) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            os.kill(sp.worker_of(driver.interface), signal.SIGKILL)
            with pytest.raises(InterfaceError, match="has failed"):
                while True:  # the last answers may still come
                    tpm.checked(driver.transmit(tpm.get_random(8)))
        sp.info(messages.ResetVm(vm_id=vm_id))


def block_and_fill(interface: Interface) -> None:
    """Makes the VM's doorbell one on which writing blocks: its holder shares its flags with the SP."""
    assert isinstance(interface, InterfaceMemory)
    doorbell = interface.descriptors.vm_doorbell
    with suppress(BlockingIOError):
        os.eventfd_read(doorbell)
    os.eventfd_write(doorbell, (1 << 64) - 2)
    with pytest.raises(BlockingIOError):
        os.eventfd_write(doorbell, 1)
    os.set_blocking(doorbell, True)


@pytest.mark.attack("A21")
def test_a_holder_that_makes_its_doorbell_block_holds_up_nobody(sp: RunningSp) -> None:
    hostile, neighbour = sp.launch(), sp.launch()
    with sp.driver(neighbour) as other, sp.driver(hostile) as driver:
        tpm.checked(other.transmit(tpm.startup()))
        tpm.checked(driver.transmit(tpm.startup()))
        block_and_fill(driver.interface)
        sp.info(messages.StopVm(vm_id=hostile))
        sp.info(messages.StartVm(vm_id=hostile))
        tpm.checked(other.transmit(tpm.nv_define(0x01500001, 8)))
    assert sp.stop() == 0


@pytest.mark.attack("A13")
@pytest.mark.attack("A30")
def test_a_vtpm_destroyed_under_a_guest_and_made_again_would_be_a_pcr_reset_and_is_for_another_boot(
    sp: RunningSp,
) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        sp.destroy(vm_id)
        for request in (messages.CreateVtpm, messages.LaunchVm, messages.StartVm, messages.ResetVm):
            with pytest.raises(NotFound):
                sp.info(request(vm_id=vm_id))
        with sp.channel() as channel:
            channel.provision(vm_id, sp.key(vm_id))
        with pytest.raises(WrongState):
            sp.info(messages.CreateVtpm(vm_id=vm_id))
        assert sp.info(messages.LaunchVm(vm_id=vm_id)).vtpm is not None
        with pytest.raises(InterfaceError, match=r"powered off|has closed"):
            driver.transmit(tpm.get_random(8), timeout_s=20)


@pytest.mark.attack("A13")
def test_a_command_under_way_over_a_reset_ends_at_once(sp: RunningSp) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver, ThreadPoolExecutor(1) as pool:
        tpm.checked(driver.transmit(tpm.startup()))
        for unique in range(3):
            long = pool.submit(driver.transmit, tpm.create_primary(tpm.rsa2048(unique=bytes([unique]) * 256)))
            sp.info(messages.ResetVm(vm_id=vm_id))
            with pytest.raises(SpvtpmError):
                while True:
                    tpm.checked(long.result(60))
                    long = pool.submit(driver.transmit, tpm.get_random(8))


@pytest.mark.attack("A21")
def test_a_parked_vtpm_that_rings_while_the_zygote_is_started_again_is_woken_as_it_was(sp: RunningSp) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        tpm.checked(driver.transmit(tpm.pcr_extend(16, bytes(range(32)))))
        extended = tpm.pcr_in(driver.transmit(tpm.pcr_read(16)))
        for _ in range(3):
            sp.info(messages.ParkVtpm(vm_id=vm_id))
            zygote = sp.workers()[0]
            os.kill(zygote, signal.SIGKILL)
            assert tpm.pcr_in(driver.transmit(tpm.pcr_read(16))) == extended


@pytest.mark.attack("A16")
def test_the_end_of_the_sp_amid_launches_wakes_and_parkings_is_orderly(state_directory: Path) -> None:
    with RunningSp(state_directory, "park_after_s = 0.05\n") as sp:
        vms = [sp.launch() for _ in range(6)]
        for number in range(6):
            if number:
                sp.start()
                for vm_id in vms:
                    sp.info(messages.StartVm(vm_id=vm_id))
            for vm_id in vms:
                with sp.driver(vm_id) as driver:
                    tpm.checked(driver.transmit(tpm.startup()))
            extra = sp.new_vm()
            with ThreadPoolExecutor(8) as pool:
                for vm_id in vms:
                    pool.submit(_ignoring, sp, messages.ParkVtpm(vm_id=vm_id))
                    pool.submit(_ignoring, sp, messages.WakeVtpm(vm_id=vm_id))
                pool.submit(_ignoring, sp, messages.LaunchVm(vm_id=extra))
                assert sp.stop() == 0
        assert "Traceback" not in sp.log()
        assert "not shut down in order" not in sp.log()
        assert "no orderly shutdown" not in sp.log()


def _ignoring(sp: RunningSp, request: messages.Request) -> None:
    with suppress(SpvtpmError):
        sp.call(request)


@pytest.mark.attack("A22")
def test_a_worker_that_hangs_keeps_neither_the_parking_nor_the_end_of_the_others(state_directory: Path) -> None:
    with RunningSp(state_directory, "park_after_s = 0.05\n") as sp:
        hanging, others = sp.launch(), [sp.launch() for _ in range(3)]
        with sp.driver(hanging) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            os.kill(sp.worker_of(driver.interface), signal.SIGSTOP)
            wait_until(lambda: all(_residency(sp, vm_id) == "parked" for vm_id in others))
            assert sp.stop() == 0
        assert sp.log().count("cut off") == 1


def _residency(sp: RunningSp, vm_id: uuid.UUID) -> str:
    vtpm = sp.vm(vm_id).vtpm
    return "" if vtpm is None else vtpm.residency
