"""The VM security management module: commands from the hypervisor, carried out on security blocks and their vTPMs.

The hypervisor decides when a VM boots, stops and sleeps. Which VM there is, whose it is, which vTPM it has, and when all that is
destroyed, is its owner's to say (`owner_commands.py`).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from spvtpm.processor.allowed import Here
from spvtpm.processor.hibernation import hibernate
from spvtpm.processor.launch_secrets import LaunchSecrets
from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.residency import Residency
from spvtpm.processor.rollback_guard import RollbackGuard
from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.processor.users import Users
from spvtpm.processor.vm_table import VmTable, block_change
from spvtpm.processor.vtpm_manager import Binding, VtpmManager
from spvtpm.processor.vtpm_records import RECORD_PREFIXES, hibernated_name, record_names
from spvtpm.processor.vtpm_services import Commit
from spvtpm.wire.errors import DirectPathOnly, SpvtpmError, StorageError, WrongState
from spvtpm.wire.messages import PAGE_VMS, Endorsement, LaunchVm, StartVm, VmInfo, VmList, VtpmInfo

log = logging.getLogger(__name__)

EMULATOR_REFUSED = "emulator-refused"
"""The event."""


class SecurityManager:
    """What a hypervisor may command. Commands on one VM come one after the other, those on different VMs side by side.

    Args:
        store: where states are kept, for reading.
        commit: makes changes to it durable.
        guard: makes such changes durable that must never be undone.
        table: the security blocks.
        vtpms: the vTPM manager.
        secrets: of the VMs that run.
        users: who may have what.
        here: this chip, and what runs on it.
    """

    def __init__(
        self,
        store: NvStore,
        commit: Commit,
        guard: RollbackGuard,
        table: VmTable,
        vtpms: VtpmManager,
        secrets: LaunchSecrets,
        users: Users,
        here: Here,
    ) -> None:
        self._store = store
        self._commit = commit
        self._guard = guard
        self._table = table
        self._vtpms = vtpms
        self._secrets = secrets
        self._users = users
        self._here = here

    async def load(self) -> None:
        """Takes over what is stored, at start, and removes state that no block names; while a block is damaged, all stays.

        For the start only: a vTPM that is being made has a record before its block is in the table.
        """
        self._table.load(self._store)
        bound = {block.vtpm_id: block for block in self._table if block.vtpm_id is not None}
        for vtpm_id, block in bound.items():
            self._vtpms.load(vtpm_id, block.vm_id)
        known = {name for vtpm_id in bound for name in record_names(vtpm_id)}
        orphans = [name for prefix in RECORD_PREFIXES for name in self._store.names(prefix) if name not in known]
        if orphans and not self._table.damaged():
            log.warning("removing %d vTPM records that belong to no VM", len(orphans))
            await self._commit([(name, None) for name in orphans])

    async def launch(self, request: LaunchVm) -> VmInfo:
        """Begins a provisioned VM's first boot; a vTPM that its owner wants new is made, and becomes durable with the block.

        Raises:
            NotFound: its owner has not provisioned it.
            AlreadyExists: it has been launched before.
            WrongState: it has a vTPM already, and cannot be without, or not by the TPM emulator interface.
            PermissionRefused: `vm_uid` is no user of VMs.
            ChipNotAllowed, FirmwareTooOld, DirectPathOnly: its owner's policy does not allow this.
            ResourceError: it is as it was.
        """
        vm_id = request.vm_id
        async with self._table.lock(vm_id):
            block = self._table.get(vm_id)
            self._users.check(request.vm_uid)
            async with self._telling_the_owner(vm_id):
                launched = block.launch(request.vm_uid, emulated=request.emulated)
            self._here.check(block.ownership.policy)
            if block.vtpm_id is not None:
                if not request.with_vtpm:
                    raise WrongState(f"launch: the vTPM of VM {vm_id} was imported: launch it with its vTPM")
                await self._start(block, launched)
                return self.info(vm_id)
            self._table.put(launched)
            try:
                if request.with_vtpm:
                    await self._create_vtpm(launched, before=block)
                else:
                    await self._commit([block_change(launched)])
            except BaseException:
                self._table.put(block)
                raise
            self._offer_secret(vm_id)
            return self.info(vm_id)

    def _offer_secret(self, vm_id: uuid.UUID) -> None:
        block = self._table.get(vm_id)
        try:
            self._secrets.offer(block, self._users.of(block))
        except SpvtpmError as error:  # the VM runs, and has to be reset for its key
            log.error("VM %s: its launch secret cannot be offered: %s", vm_id, error)

    async def create_vtpm(self, vm_id: uuid.UUID) -> VmInfo:
        """A vTPM for a running VM that has none (C3).

        Raises:
            NotFound, AlreadyExists, WrongState: the block does not allow it.
            ResourceError: nothing was made.
        """
        async with self._table.lock(vm_id):
            block = self._table.get(vm_id)
            await self._create_vtpm(block, before=block)
            return self.info(vm_id)

    async def _create_vtpm(self, block: VmSecurityBlock, before: VmSecurityBlock) -> None:
        block.check_unbound()

        def bind(vtpm_id: uuid.UUID) -> Binding:
            return Binding(block_change(block.bind(vtpm_id)), block_change(before))

        banks = block.ownership.policy.pcr_banks
        vtpm = await self._vtpms.create(block.vm_id, self._users.boot_of(block), bind, banks)
        self._table.put(block.bind(vtpm.vtpm_id))

    async def start(self, request: StartVm) -> VmInfo:
        """A new boot of a stopped VM, or one that goes on where a hibernated VM was.

        Raises:
            NotFound, WrongState: the block does not allow it.
            PermissionRefused: `vm_uid` is no user of VMs.
            ChipNotAllowed, FirmwareTooOld, DirectPathOnly: its owner's policy does not allow this.
            IntegrityError: its vTPM's stored state cannot be believed; the VM is as it was.
            ResourceError: it is as it was.
        """
        vm_id = request.vm_id
        async with self._table.lock(vm_id):
            block = self._table.get(vm_id)
            self._users.check(request.vm_uid)
            async with self._telling_the_owner(vm_id):
                started = block.start(request.vm_uid, emulated=request.emulated)
            await self._start(block, started)
            return self.info(vm_id)

    @asynccontextmanager
    async def _telling_the_owner(self, vm_id: uuid.UUID) -> AsyncIterator[None]:
        """That the host wanted the TPM emulator interface against his will; once, or attempts would wash other events away."""
        try:
            yield
        except DirectPathOnly as error:
            log.warning("VM %s: %s", vm_id, error)
            block = self._table.get(vm_id)
            if not any(event.what == EMULATOR_REFUSED for event in block.events):
                noted = block.noting(EMULATOR_REFUSED, "the host wanted to start it there")
                await self._commit([block_change(noted)])
                self._table.put(noted)
            raise

    async def _start(self, block: VmSecurityBlock, started: VmSecurityBlock) -> None:
        await self._boot(block, started)
        self._offer_secret(block.vm_id)

    async def _boot(self, block: VmSecurityBlock, started: VmSecurityBlock) -> None:
        self._here.check(block.ownership.policy)
        if block.state is VmState.HIBERNATED:
            await self._resume(block, started)
            return
        self._table.put(started)
        saving = asyncio.ensure_future(self._commit([block_change(started)]))  # the disk works meanwhile
        try:
            if started.vtpm_id is not None:
                await self._vtpms.get(started.vtpm_id).power_on(self._users.boot_of(started))
            await saving
        except SpvtpmError:
            (unsaved,) = await asyncio.gather(saving, return_exceptions=True)
            stopped = await self._stop(started)
            await self._release(stopped)
            if unsaved is not None:  # as it was, but another: a guest may have run, so a file given out before is void
                self._table.put(replace(block))
            raise

    async def _resume(self, block: VmSecurityBlock, resumed: VmSecurityBlock) -> None:
        """The hibernated state is taken out of NV for good before the guest can act on it: it is good for one resumption."""
        vtpm = self._vtpms.of(block)
        name = hibernated_name(vtpm.vtpm_id)
        volatile = self._store.read(name)
        await self._guard.milestone([(name, None), block_change(resumed)])
        self._table.put(resumed)
        try:
            await vtpm.power_on(self._users.boot_of(resumed), volatile)
        except SpvtpmError:
            await vtpm.abandon()
            await self._guard.milestone([(name, volatile), block_change(block)])
            self._table.put(block)
            raise

    async def stop(self, vm_id: uuid.UUID) -> VmInfo:
        """The VM is powered off; its vTPM is shut down in order.

        Raises:
            NotFound, WrongState: the block does not allow it.
        """
        async with self._table.lock(vm_id):
            stopped = await self._stop(self._table.get(vm_id))
            await self._release(stopped)
            try:
                await self._commit([block_change(stopped)])
            except StorageError as error:  # a stored block is a stopped one: only the event is lost
                log.error("VM %s: that it was stopped is not durable: %s", vm_id, error)
            return self.info(vm_id)

    async def _stop(self, block: VmSecurityBlock) -> VmSecurityBlock:
        stopped = block.stop()
        self._secrets.withdraw(block.vm_id)
        if block.vtpm_id is not None:
            await self._vtpms.get(block.vtpm_id).power_off()
        self._table.put(stopped)
        return stopped

    async def _release(self, block: VmSecurityBlock) -> None:
        if block.vtpm_id is not None:
            await self._vtpms.get(block.vtpm_id).release()

    async def reset(self, vm_id: uuid.UUID) -> VmInfo:
        """Ends the boot under way and begins a new one; the interface stays, every old frame is dead.

        Raises:
            as `stop` and `start`.
        """
        async with self._table.lock(vm_id):
            stopped = await self._stop(self._table.get(vm_id))
            await self._start(stopped, stopped.start(stopped.vm_uid, emulated=stopped.emulated))
            return self.info(vm_id)

    async def hibernate(self, vm_id: uuid.UUID) -> VmInfo:
        """Takes a suspended VM's vTPM out of memory, whole, for the next start or for an export.

        Raises:
            NotFound, WrongState: the block does not allow it.
            StorageError, WorkerError: the VM runs on.
        """
        async with self._table.lock(vm_id):
            block = self._table.get(vm_id)
            is_untouched = bool(self._secrets.path(vm_id))
            hibernated = block.hibernate(is_untouched=is_untouched)
            vtpm = self._vtpms.of(block)

            async def save(volatile: bytes) -> None:
                await self._guard.milestone([(hibernated_name(vtpm.vtpm_id), volatile), block_change(hibernated)])

            if is_untouched:  # and stays so
                self._secrets.withdraw(vm_id)
            try:
                await hibernate(vtpm, save)
            except SpvtpmError:
                if is_untouched and self._table.get(vm_id).state is VmState.RUNNING:
                    self._offer_secret(vm_id)
                raise
            self._secrets.withdraw(vm_id)
            self._table.put(hibernated)
            return self.info(vm_id)

    async def park(self, vm_id: uuid.UUID) -> VmInfo:
        """Parks the VM's vTPM.

        Raises:
            NotFound, WrongState: it is not active.
            WorkerError: it died; the VM has failed.
        """
        async with self._table.lock(vm_id):
            if not await self._vtpms.of(self._table.get(vm_id)).park():
                raise WrongState(f"the vTPM of VM {vm_id} has an NV change that is not durable yet")
            return self.info(vm_id)

    async def wake(self, vm_id: uuid.UUID) -> VmInfo:
        """Wakes the VM's parked vTPM.

        Raises:
            NotFound, WrongState: it is not parked.
            WorkerError: it died; the VM has failed.
        """
        async with self._table.lock(vm_id):
            await self._vtpms.of(self._table.get(vm_id)).wake()
            return self.info(vm_id)

    def info(self, vm_id: uuid.UUID) -> VmInfo:
        """One VM as the hypervisor may see it.

        Raises:
            NotFound: there is none.
        """
        if self._table.is_damaged(vm_id):
            return VmInfo(vm_id, "damaged", 0, None)
        block = self._table.get(vm_id)
        return VmInfo(vm_id, block.state.value, block.boots, self._vtpm_info(block), self._secrets.path(vm_id))

    def _vtpm_info(self, block: VmSecurityBlock) -> VtpmInfo | None:
        if block.vtpm_id is None:
            return None
        vtpm = self._vtpms.get(block.vtpm_id)
        path = "" if vtpm.interface is None else str(vtpm.interface.path)
        connected = vtpm.interface is not None and vtpm.interface.connected
        return VtpmInfo(vtpm.vtpm_id, vtpm.residency.value, path, connected, vtpm.failure)

    def endorsement(self, vm_id: uuid.UUID) -> Endorsement:
        """The certificates of the EKs of a VM's vTPM.

        Raises:
            NotFound, WrongState: there is none.
            IntegrityError: the record is missing or altered.
        """
        return self._vtpms.endorsement(self._vtpms.of(self._table.get(vm_id)).vtpm_id)

    def list(self, after: uuid.UUID | None) -> VmList:
        """A page of VMs, ordered by id: those after `after`."""
        everyone = [*(block.vm_id for block in self._table), *self._table.damaged()]
        following = sorted(vm_id for vm_id in everyone if after is None or vm_id > after)
        page = [self.info(vm_id) for vm_id in following[:PAGE_VMS]]
        return VmList(page, more=len(following) > len(page))

    def residents(self) -> tuple[int, int, int]:
        """How many VMs there are, and how many active and parked vTPMs."""
        count = self._vtpms.count()
        return len(self._table), count[Residency.ACTIVE], count[Residency.PARKED]
