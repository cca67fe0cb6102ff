"""A real secure processor driven at random by owner, hypervisor and guests, against a simple model."""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import messages
from spvtpm.wire.errors import AlreadyExists, InterfaceError, NotFound, SpvtpmError, WorkerError, WrongState
from tests import tpm_commands as tpm
from tests.harness import RunningSp
from tests.processor.processes import Doomed, wait_until, worker_of

pytestmark = [
    *(pytest.mark.claim(number) for number in ("C1", "C2", "C3", "C5", "C6b")),
    *(pytest.mark.attack(number) for number in ("A13", "A16", "A22")),
]

NEVER_PARKS = "park_after_s = 86400.0\n"
NV_INDEX = 0x01500018
NV_BYTES = 16
PCR = 16  # one that starts as zeros


@dataclass
class Vm:
    """What must be true of one VM; without a state it has no security block, without a residency no vTPM."""

    vm_id: uuid.UUID = field(default_factory=uuid.uuid4)
    state: str = ""
    boots: int = 0
    residency: str = ""
    vtpm_id: uuid.UUID | None = None
    started: bool = False
    pcr: bytes = bytes(32)
    nv: bytes | None = None

    def destroy(self) -> None:
        self.state, self.boots = "", 0
        self.residency, self.vtpm_id, self.nv = "", None, None
        self.end_boot()

    def end_boot(self) -> None:
        self.started, self.pcr = False, bytes(32)
        if self.residency:
            self.residency = "off"

    def begin_boot(self) -> None:
        if self.state != "hibernated":
            self.end_boot()
        self.state = "running"
        self.boots += 1
        if self.residency:
            self.residency = "active"


slots = st.integers(0, 2)


class SecureProcessorModel(RuleBasedStateMachine):
    """Three VMs on a daemon of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="spvtpm-")
        self.sp = RunningSp(Path(self.directory.name) / "sp", NEVER_PARKS)
        self.vms = [Vm() for _ in range(3)]

    def teardown(self) -> None:
        try:
            for vm in self.vms:
                self._look_into(vm)
        finally:
            self.sp.kill()
            self.directory.cleanup()

    def _done(self, command: Callable[[], object], refusal: type[SpvtpmError] | None) -> bool:
        """Gives a command; it must be refused just so, or carried out. Returns whether it was."""
        if refusal is None:
            command()
            return True
        with pytest.raises(SpvtpmError) as refused:
            command()
        assert type(refused.value) is refusal, refused.value
        return False

    def _told(self, request: messages.Request, refusal: type[SpvtpmError] | None) -> bool:
        return self._done(lambda: self.sp.call(request), refusal)

    # The owner

    @initialize(with_vtpm=st.booleans())
    def begin_with_two_vms(self, with_vtpm: bool) -> None:
        for slot in (0, 1):
            self.provision(slot)
            self.launch(slot, with_vtpm or not slot)

    @rule(slot=slots)
    def provision(self, slot: int) -> None:
        vm = self.vms[slot]
        with self.sp.channel() as channel:
            key = self.sp.key(vm.vm_id)
            if self._done(lambda: channel.provision(vm.vm_id, key), AlreadyExists if vm.state else None):
                vm.state = "stopped"

    @rule(slot=slots)
    def destroy(self, slot: int) -> None:
        vm = self.vms[slot]
        if self._done(lambda: self.sp.destroy(vm.vm_id), None if vm.state else NotFound):
            vm.destroy()

    # The hypervisor

    @rule(slot=slots, with_vtpm=st.booleans())
    def launch(self, slot: int, with_vtpm: bool) -> None:
        vm = self.vms[slot]
        request = messages.LaunchVm(vm_id=vm.vm_id, with_vtpm=with_vtpm)
        if self._told(request, NotFound if not vm.state else AlreadyExists if vm.boots else None):
            vm.residency = "off" if with_vtpm else ""
            vm.begin_boot()

    @rule(slot=slots)
    def create_vtpm(self, slot: int) -> None:
        vm = self.vms[slot]
        refusal = (
            NotFound
            if not vm.state
            else AlreadyExists
            if vm.residency
            else WrongState
            if vm.state != "running"
            else None
        )
        if self._told(messages.CreateVtpm(vm_id=vm.vm_id), refusal):
            vm.residency = "active"

    @rule(slot=slots)
    def start(self, slot: int) -> None:
        vm = self.vms[slot]
        at_rest = vm.state in ("stopped", "hibernated")
        refusal = NotFound if not vm.state else None if at_rest and vm.boots else WrongState
        if self._told(messages.StartVm(vm_id=vm.vm_id), refusal):
            vm.begin_boot()

    @rule(slot=slots)
    def reset(self, slot: int) -> None:
        vm = self.vms[slot]
        refusal = NotFound if not vm.state else WrongState if vm.state in ("stopped", "hibernated") else None
        if self._told(messages.ResetVm(vm_id=vm.vm_id), refusal):
            vm.begin_boot()

    @rule(slot=slots)
    def stop(self, slot: int) -> None:
        vm = self.vms[slot]
        refusal = NotFound if not vm.state else WrongState if vm.state in ("stopped", "hibernated") else None
        if self._told(messages.StopVm(vm_id=vm.vm_id), refusal):
            vm.state = "stopped"
            vm.end_boot()

    @rule(slot=slots)
    def park(self, slot: int) -> None:
        vm = self.vms[slot]
        refusal = NotFound if not vm.state else WrongState if vm.residency != "active" else None
        if self._told(messages.ParkVtpm(vm_id=vm.vm_id), refusal):
            vm.residency = "parked"

    @rule(slot=slots)
    def wake(self, slot: int) -> None:
        vm = self.vms[slot]
        refusal = NotFound if not vm.state else WrongState if vm.residency != "parked" else None
        if self._told(messages.WakeVtpm(vm_id=vm.vm_id), refusal):
            vm.residency = "active"

    @rule(slot=slots)
    def hibernate(self, slot: int) -> None:
        vm = self.vms[slot]
        asleep = vm.state == "running" and bool(vm.residency)
        refusal = NotFound if not vm.state else None if asleep else WrongState
        if self._told(messages.HibernateVm(vm_id=vm.vm_id), refusal):
            vm.state, vm.residency = "hibernated", "off"

    # The guests

    @contextmanager
    def _guest(self, vm: Vm) -> Iterator[CrbDriver | None]:
        """The VM's driver with a started TPM; none where there must be no TPM to talk to."""
        if vm.residency in ("", "off"):
            with pytest.raises(InterfaceError, match="cannot connect"), self.sp.driver(vm.vm_id):
                pass
            yield None
            return
        with self.sp.driver(vm.vm_id) as driver:
            if vm.residency == "failed":
                with pytest.raises(InterfaceError, match="has failed"):
                    driver.transmit(tpm.pcr_read(PCR))
                yield None
                return
            code = tpm.response_code(driver.transmit(tpm.startup()))
            assert code == (tpm.RC_INITIALIZE if vm.started else tpm.RC_SUCCESS)
            vm.started, vm.residency = True, "active"
            yield driver

    def _look_into(self, vm: Vm) -> None:
        with self._guest(vm) as driver:
            if driver is None:
                return
            assert tpm.pcr_in(driver.transmit(tpm.pcr_read(PCR))) == vm.pcr
            response = driver.transmit(tpm.nv_read(NV_INDEX, NV_BYTES))
            if vm.nv is None:
                assert tpm.response_code(response) != tpm.RC_SUCCESS
            else:
                assert tpm.nv_content_in(response) == vm.nv

    @rule(slot=slots)
    def look_into(self, slot: int) -> None:
        self._look_into(self.vms[slot])

    @rule(slot=slots, digest=st.binary(min_size=32, max_size=32))
    def extend_pcr(self, slot: int, digest: bytes) -> None:
        vm = self.vms[slot]
        with self._guest(vm) as driver:
            if driver is not None:
                tpm.checked(driver.transmit(tpm.pcr_extend(PCR, digest)))
                vm.pcr = hashlib.sha256(vm.pcr + digest).digest()

    @rule(slot=slots, content=st.binary(min_size=NV_BYTES, max_size=NV_BYTES))
    def write_nv(self, slot: int, content: bytes) -> None:
        vm = self.vms[slot]
        with self._guest(vm) as driver:
            if driver is not None:
                if vm.nv is None:
                    tpm.checked(driver.transmit(tpm.nv_define(NV_INDEX, NV_BYTES)))
                tpm.checked(driver.transmit(tpm.nv_write(NV_INDEX, content)))
                vm.nv = content

    # What dies

    @contextmanager
    def _worker_killed(self, vm: Vm) -> Iterator[InterfaceMemory]:
        with InterfaceMemory.connect(self.sp.interface(vm.vm_id)) as memory:
            Doomed(worker_of(self.sp.process.pid, memory.descriptors.memory)).kill()
            yield memory

    @rule(slot=slots, then=st.sampled_from(["transmit", "park", "hibernate", "stop", "reset", "destroy"]))
    def kill_worker(self, slot: int, then: str) -> None:
        vm = self.vms[slot]
        if vm.residency != "active":
            return
        with self._worker_killed(vm) as memory:
            if then == "transmit":
                wait_until(lambda: self.sp.vm(vm.vm_id).state == "failed")
                with pytest.raises(InterfaceError, match="has failed"):
                    CrbDriver(memory, self.sp.key(vm.vm_id)).transmit(tpm.pcr_read(PCR))
            elif then in ("park", "hibernate"):
                request = messages.ParkVtpm if then == "park" else messages.HibernateVm
                with pytest.raises((WorkerError, WrongState)):
                    self.sp.call(request(vm_id=vm.vm_id))
        vm.residency = vm.state = "failed"
        if then in ("stop", "reset", "destroy"):  # a command that meets the death before anybody has seen it
            getattr(self, then)(slot)
        for other in self.vms:
            if other is not vm:
                self._look_into(other)

    @rule(how=st.sampled_from(["kill", "kill", "stop"]))
    def restart_the_secure_processor(self, how: str) -> None:
        if how == "kill":
            self.sp.kill()
        else:
            assert self.sp.stop() == 0
        self.sp.start()
        for vm in self.vms:
            if vm.state not in ("", "hibernated"):
                vm.state = "stopped"
                vm.end_boot()

    @invariant()
    def the_hypervisor_sees_what_the_model_says(self) -> None:
        reply = self.sp.call(messages.ListVms())
        assert isinstance(reply, messages.VmList)
        seen = {vm.vm_id: vm for vm in reply.vms}
        assert [info.vm_id for info in reply.vms] == sorted(vm.vm_id for vm in self.vms if vm.state)
        for vm in self.vms:
            if vm.state:
                info = seen[vm.vm_id]
                assert (info.state, info.boots) == (vm.state, vm.boots)
                assert (info.vtpm.residency if info.vtpm else "") == vm.residency
                if info.vtpm is not None:
                    vm.vtpm_id = vm.vtpm_id or info.vtpm.vtpm_id
                    assert info.vtpm.vtpm_id == vm.vtpm_id, "the binding never changes"
                    assert bool(info.vtpm.interface) == (vm.residency != "off")
                    assert bool(info.vtpm.failure) == (vm.residency == "failed")
        status = self.sp.call(messages.GetStatus())
        assert isinstance(status, messages.Status)
        residencies = [vm.residency for vm in self.vms]
        assert (status.vms, status.active, status.parked) == (
            len(seen),
            residencies.count("active"),
            residencies.count("parked"),
        )


SecureProcessorModel.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

TestSecureProcessorModel = SecureProcessorModel.TestCase
