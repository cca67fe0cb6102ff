"""Carries out single steps on one VM: at the secure processor, and at its machine."""

from __future__ import annotations

import asyncio
import logging
import uuid
from pathlib import Path
from typing import Final, Literal

from msgspec.structs import replace

from spvtpm.hypervisor.handoffs import Handoffs
from spvtpm.hypervisor.records import Record
from spvtpm.hypervisor.secure_processor import SecureProcessor
from spvtpm.hypervisor.steps import Sight, Step, next_step
from spvtpm.hypervisor.virtual_machine import Boot, VirtualMachine
from spvtpm.wire.errors import NotRunning, SpvtpmError, WrongState
from spvtpm.wire.memory_records import STREAM_MAGIC
from spvtpm.wire.messages import HibernateVm, LaunchVm, Request, ResetVm, StartVm, StopVm, VmInfo

log = logging.getLogger(__name__)

BOOTS_AT_A_TIME: Final = 8


class Performer:
    """What can be done with one VM. Steps come one after the other.

    Args:
        vm_id: the VM.
        sp: the host's secure processor.
        machine: the VM's machine.
        boots: so many machines come up at a time.
    """

    def __init__(
        self, vm_id: uuid.UUID, sp: SecureProcessor, machine: VirtualMachine, boots: asyncio.Semaphore
    ) -> None:
        self._vm_id = vm_id
        self._sp = sp
        self._machine = machine
        self._boots = boots
        self._handoffs = Handoffs(vm_id, sp, machine)
        self._block: VmInfo | None = None
        self._begun = 0
        self._admitted_to: tuple[int, int] | None = None  # an instance of the secure processor; the next may not know

    @property
    def machine(self) -> VirtualMachine:
        """The VM's machine."""
        return self._machine

    @property
    def handoffs(self) -> Handoffs:
        """What moves it from, or to, another host."""
        return self._handoffs

    def has_image(self) -> bool:
        """Whether there is a memory image of a VM that is not running."""
        return self._machine.image.is_file()

    def machine_for_report(self, block: VmInfo | None) -> Literal["none", "changing", "running"]:
        """What the machine does, for the platform."""
        if self._machine.state == "none":
            return "none"
        runs = self._machine.state == "running" and block is not None and block.state == "running"
        return "running" if runs and block is not None and block.boots == self._machine.boots else "changing"

    async def look(self, record: Record) -> Step:
        """What to do next.

        Raises:
            NotRunning: the secure processor is away.
            SpvtpmError: the VM cannot become as it was ordered to be.
        """
        await self._machine.tidy()
        self._block = await self._sp.vm(self._vm_id)
        return self.next_step(record, self._block)

    def next_step(self, record: Record, block: VmInfo | None) -> Step:
        """What to do next, if the secure processor has this of the VM.

        Raises:
            SpvtpmError: the VM cannot become as it was ordered to be.
        """
        return next_step(
            Sight(
                vm_id=self._vm_id,
                want=record.want,
                resuming=record.resuming,
                block=block,
                admitted=self._admitted_to is not None and self._admitted_to == self._sp.instance(),
                begun=self._begun,
                machine=self._machine.state,
                machine_boots=self._machine.boots,
                image=self.has_image(),
                kept=self._machine.is_kept,
                brought=record.brought,
                handoff=record.handoff,
                way=self._handoffs.way(record.handoff),
            )
        )

    async def perform(self, step: Step, record: Record) -> Record:
        """Does it; returns the record as it is then.

        Raises:
            NotRunning: the secure processor is away, and has done it or not.
            SpvtpmError: it cannot be done.
        """
        machine, vm_id = self._machine, self._vm_id
        match step:
            case Step.NOTHING:
                pass
            case Step.ADMIT:
                instance = self._sp.instance()
                await self._sp.admit(vm_id)
                self._admitted_to = instance
            case Step.LAUNCH:
                await self._begin(LaunchVm(vm_id=vm_id, vm_uid=await machine.prepare(), emulated=machine.by_emulator))
            case Step.START:
                await self._begin(StartVm(vm_id=vm_id, vm_uid=await machine.prepare(), emulated=machine.by_emulator))
            case Step.RESET:
                await self._begin(ResetVm(vm_id=vm_id))
            case Step.STOP:
                await self._sp.call(StopVm(vm_id=vm_id), VmInfo)
            case Step.HIBERNATE:
                await self._hibernate()
            case Step.MARK_RESUMING:
                return replace(record, resuming=True)
            case Step.BEGIN_MACHINE:
                await self._begin_machine(record)
            case Step.AWAIT_MACHINE:
                await machine.await_ready()
            case Step.POWER_OFF:
                await machine.stop()
            case Step.END_MACHINE:
                await machine.end()
            case Step.SUSPEND:
                await machine.suspend()
            case Step.GO_ON:
                await machine.go_on()
            case Step.FORGET_IMAGE:
                await machine.forget_image()
                return replace(record, resuming=False)
            case Step.REMOVE:
                await machine.remove()
                return replace(record, resuming=False)
            case _:
                return await self._handoffs.perform(step, record)
        return record

    async def _begin(self, request: Request) -> None:
        before = self._block
        block = await self._sp.call(request, VmInfo)
        # A vTPM that has gone on without its VM's memory, for that is lost, needs a boot of its own.
        is_lost = before is not None and before.state == "hibernated" and not self.has_image()
        self._begun = 0 if is_lost else block.boots

    async def _begin_machine(self, record: Record) -> None:
        block = self._block
        assert block is not None  # noqa: S101  # `next_step` has seen a boot
        self._begun = 0
        interface = Path(block.vtpm.interface) if block.vtpm is not None and block.vtpm.interface else None
        secret = Path(block.launch_secret) if block.launch_secret else None
        boot = Boot(block.boots, interface, secret, resumes=record.resuming)
        try:
            async with self._boots:
                await self._machine.start(boot)
        except SpvtpmError:
            await self._end_boot(record)
            raise

    async def _end_boot(self, record: Record) -> None:
        """No machine takes part in a boot: it ends. One that was to go on from its image can try again later."""
        requests: list[Request] = [StopVm(vm_id=self._vm_id)]
        if record.resuming and self.has_image() and not await self._is_memory_used_up():
            requests.insert(0, HibernateVm(vm_id=self._vm_id))
        for request in requests:
            try:
                await self._sp.call(request, VmInfo)
            except SpvtpmError as error:
                log.warning("VM %s: its boot could not be ended by %s: %s", self._vm_id, type(request).__name__, error)
            else:
                return

    async def _is_memory_used_up(self) -> bool:
        """Whether its memory came from another host, and a machine has had the key for it: no other boot goes on with that."""
        try:
            block = await self._sp.vm(self._vm_id)
            image = await self._machine.read_image()
        except SpvtpmError:
            return False
        return image.startswith(STREAM_MAGIC) and block is not None and not block.launch_secret

    async def _hibernate(self) -> None:
        """The vTPM follows its suspended VM; if it cannot, the VM runs on."""
        try:
            await self._sp.call(HibernateVm(vm_id=self._vm_id), VmInfo)
        except NotRunning:
            raise
        except SpvtpmError:
            if self._machine.state == "suspended":
                await self._machine.go_on()
            raise

    async def put_image(self, image: bytes) -> None:
        """Stores a memory image that was brought from elsewhere.

        Raises:
            WrongState: the VM runs.
            SpvtpmError: the secure processor cannot be asked, or the image not be written.
        """
        block = await self._sp.vm(self._vm_id)
        if self._machine.state != "none" or (block is not None and block.state in ("running", "failed")):
            raise WrongState(f"VM {self._vm_id} runs: it takes no other memory now")
        await self._machine.put_image(image)

    async def power_down(self, record: Record) -> None:
        """Ends machine and boot in order, whatever was ordered: the agent is being stopped."""
        try:
            if record.handoff is not None and record.handoff.is_unsettled:
                await self._handoffs.settle(record)  # which the next start does once more, and remembers
            await self._handoffs.close()
            had_machine = self._machine.state != "none"
            if had_machine:
                await self._machine.stop()
            block = await self._sp.vm(self._vm_id)
            if block is not None and block.state in ("running", "failed"):
                await self._end_boot(record if not had_machine else replace(record, resuming=False))
        except SpvtpmError as error:
            log.warning("VM %s is not powered off in order: %s", self._vm_id, error)
