"""All VMs of this host: takes the platform's orders, and looks again and again whether everything is as ordered."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from spvtpm.hypervisor.handoffs import report_of
from spvtpm.hypervisor.keeper import VmKeeper
from spvtpm.hypervisor.performer import BOOTS_AT_A_TIME, Performer
from spvtpm.hypervisor.records import MAX_ABSENT, Record, Records
from spvtpm.hypervisor.secure_processor import SecureProcessor
from spvtpm.hypervisor.virtual_machine import Console, MachineDriver
from spvtpm.wire.agent_api import PAGE_REPORTS, HostReport, Order, VmReport, VmReports
from spvtpm.wire.errors import NotFound, SpvtpmError, TooMany, WrongState
from spvtpm.wire.messages import VmInfo

log = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 1.0


class Conductor:
    """Has a keeper for each VM. Life: construct → `start()` → … → `close()`.

    Args:
        sp: the host's secure processor.
        driver: of the VMs' machines.
        records: of orders.
        max_vms: so many VMs at a time.
    """

    def __init__(self, sp: SecureProcessor, driver: MachineDriver, records: Records, max_vms: int) -> None:
        self._sp = sp
        self._driver = driver
        self._records = records
        self._max_vms = max_vms
        self._boots = asyncio.Semaphore(BOOTS_AT_A_TIME)
        self._keepers: dict[uuid.UUID, VmKeeper] = {}
        self._absent: dict[uuid.UUID, Record] = {}  # the oldest first
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes over machines that an earlier agent has left, and goes on with its orders."""
        records = {record.vm_id: record for record in await asyncio.to_thread(self._records.load)}
        known = self._driver.known()
        for vm_id, record in records.items():
            if record.want == "absent" and not record.failure and vm_id not in known:
                self._absent[vm_id] = record
            else:
                self._keep(record)
        for vm_id in known - records.keys():
            log.warning("VM %s is here, and nothing says what was ordered for it", vm_id)
            self._keep(Record(vm_id=vm_id))
        for keeper in self._keepers.values():
            await keeper.performer.machine.adopt()
            keeper.start()
        self._watch = asyncio.get_running_loop().create_task(self._look_for_ever())

    def _keep(self, record: Record) -> VmKeeper:
        vm_id = record.vm_id
        machine = self._driver.machine(vm_id, lambda: self._wake(vm_id))
        keeper = VmKeeper(record, self._records, Performer(vm_id, self._sp, machine, self._boots))
        self._keepers[vm_id] = keeper
        return keeper

    def _wake(self, vm_id: uuid.UUID) -> None:
        if vm_id in self._keepers:
            self._keepers[vm_id].wake()

    def _keeper(self, vm_id: uuid.UUID, *, is_leaving: bool = False) -> VmKeeper:
        """The keeper of a VM; of one that is new here, a new one. To forget one takes no room.

        Raises:
            TooMany: this host has no room for another VM.
        """
        keeper = self._keepers.get(vm_id)
        if keeper is None:
            if len(self._keepers) >= self._max_vms and not is_leaving:
                raise TooMany(f"this host takes {self._max_vms} VMs, and has as many")
            keeper = self._keep(self._absent.pop(vm_id, Record(vm_id=vm_id)))
            keeper.start()
        return keeper

    async def order(self, vm_id: uuid.UUID, order: Order) -> VmReport:
        """Takes an order, and waits until the VM is as ordered.

        Raises:
            Superseded: it is older than another.
            TooMany: this host has no room for another VM.
            SpvtpmError: it cannot be carried out, or not now.
        """
        keeper = self._keeper(vm_id, is_leaving=order.want == "absent")
        try:
            await keeper.order(order)
        finally:
            await self._retire()
        return await self.report(vm_id)

    async def put_image(self, vm_id: uuid.UUID, sequence: int, image: bytes) -> None:
        """Stores a memory image that was brought from elsewhere.

        Raises:
            Superseded: an order is newer.
            WrongState: the VM runs.
            SpvtpmError: it cannot be stored.
        """
        try:
            await self._keeper(vm_id).put_image(sequence, image)
        finally:
            await self._retire()

    async def image(self, vm_id: uuid.UUID) -> bytes:
        """The memory image of a hibernated VM.

        Raises:
            NotFound: there is none.
            WrongState: the VM is not hibernated.
        """
        keeper = self._keepers.get(vm_id)
        if keeper is None or not keeper.performer.has_image():
            raise NotFound(f"there is no memory image of VM {vm_id} here")
        if keeper.performer.machine.state != "none":
            raise WrongState(f"VM {vm_id} is not hibernated, so its image is not the last word")
        return await keeper.performer.machine.read_image()

    def console(self, vm_id: uuid.UUID) -> Console:
        """A VM's console.

        Raises:
            NotFound: no such VM.
            WrongState: it does not run.
        """
        keeper = self._keepers.get(vm_id)
        if keeper is None:
            raise NotFound(f"there is no VM {vm_id} here")
        return keeper.performer.machine.console()

    @contextmanager
    def link(self, vm_id: uuid.UUID, handoff: bytes) -> Iterator[Path]:
        """The link of a handoff is being carried: from or to the socket of the secure processor that this gives.

        Args:
            vm_id: the VM.
            handoff: its id, 16 bytes.

        Raises:
            NotFound: the VM has no part here in such a handoff.
            WrongState: it has its link, or had it.
        """
        keeper = self._keepers.get(vm_id)
        if keeper is None:
            raise NotFound(f"there is no VM {vm_id} here")
        with keeper.performer.handoffs.linked(handoff):
            keeper.wake()
            yield self._sp.migration_socket

    async def report(self, vm_id: uuid.UUID) -> VmReport:
        """How a VM is; also of one that is nowhere.

        Raises:
            NotRunning: the secure processor is away.
        """
        return self._report(vm_id, await self._sp.vm(vm_id))

    async def reports(self, after: uuid.UUID | None) -> VmReports:
        """A page of the VMs that are here.

        Raises:
            NotRunning: the secure processor is away.
        """
        blocks = await self._sp.vms()
        ids = sorted(vm_id for vm_id in self._keepers.keys() | blocks.keys() if after is None or vm_id > after)
        page = [self._report(vm_id, blocks.get(vm_id)) for vm_id in ids[:PAGE_REPORTS]]
        return VmReports(vms=page, more=len(ids) > PAGE_REPORTS)

    def _report(self, vm_id: uuid.UUID, block: VmInfo | None) -> VmReport:
        keeper = self._keepers.get(vm_id)
        if keeper is not None:
            return keeper.report(block)
        absent = self._absent.get(vm_id)
        return VmReport(
            vm_id=vm_id,
            sequence=absent.sequence if absent else 0,
            want=absent.want if absent else None,
            machine="none",
            security_block=block,
            image=False,
            handoff=None if absent is None else report_of(absent.handoff),
        )

    async def host(self) -> HostReport:
        """The host, and its secure processor.

        Raises:
            NotRunning: the secure processor is away.
        """
        status, papers = await self._sp.status(), await self._sp.papers()
        return HostReport(
            chip_id=status.chip_id,
            firmware=status.firmware,
            software=status.software[:64],
            max_vms=min(self._max_vms, status.max_vms),
            vms=max(len(self._keepers), status.vms),
            active=status.active,
            parked=status.parked,
            missing_protection=[sentence[:2048] for sentence in status.missing_protection[:16]],
            papers=papers,
        )

    async def _look_for_ever(self) -> None:
        is_there = True
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                blocks = await self._sp.vms()
            except SpvtpmError as error:
                if is_there:
                    log.warning("the secure processor is away: %s", error)
                is_there = False
                continue
            if not is_there:
                log.info("the secure processor is back")
            is_there = True
            for keeper in list(self._keepers.values()):
                keeper.look(blocks.get(keeper.vm_id))
            await self._retire()

    async def _retire(self) -> None:
        """Lets go of VMs that are absent, as ordered; of the last of them, what was ordered is remembered."""
        for keeper in [keeper for keeper in self._keepers.values() if keeper.is_absent]:
            del self._keepers[keeper.vm_id]
            if keeper.record.sequence:
                self._absent[keeper.vm_id] = keeper.record
            await keeper.close()
        while len(self._absent) > MAX_ABSENT:
            oldest = next(iter(self._absent))
            del self._absent[oldest]
            self._records.forget(oldest)

    def take_no_more(self) -> None:
        """The agent is being stopped: takes no more orders, and tells those who wait for one's end."""
        for keeper in self._keepers.values():
            keeper.take_no_more()

    async def close(self) -> None:
        """Powers all VMs off. What was ordered stays ordered, so the next start boots them again."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.gather(*(keeper.close() for keeper in self._keepers.values()), return_exceptions=True)
