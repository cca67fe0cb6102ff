"""The VM security management module: commands from the hypervisor, carried out on security blocks and their vTPMs.

The hypervisor decides when a VM boots, stops and goes. It does not decide which vTPM a VM has: the binding is made here, once.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from weakref import WeakValueDictionary

from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.processor.vm_keys import VmKeys
from spvtpm.processor.vtpm import VTPM_PREFIX, Commit, Residency, Vtpm, record_name
from spvtpm.processor.vtpm_manager import Binding, VtpmManager
from spvtpm.wire.errors import AlreadyExists, IntegrityError, NotFound, ResourceError, SpvtpmError, WrongState
from spvtpm.wire.messages import PAGE_VMS, VmInfo, VmList, VtpmInfo

log = logging.getLogger(__name__)

_RECORD_PREFIX = "vmsb/"


def _record_name(vm_id: uuid.UUID) -> str:
    return f"{_RECORD_PREFIX}{vm_id}"


class SecurityManager:
    """Owns the VMSB table. Commands on one VM come one after the other, those on different VMs side by side.

    Args:
        store: where blocks are kept, for reading.
        commit: makes changes to it durable.
        vtpms: the vTPM manager.
        keys: where VM keys come from.
        max_vms: blocks at a time.
    """

    def __init__(self, store: NvStore, commit: Commit, vtpms: VtpmManager, keys: VmKeys, max_vms: int) -> None:
        self._store = store
        self._commit = commit
        self._vtpms = vtpms
        self._keys = keys
        self._max_vms = max_vms
        self._blocks: dict[uuid.UUID, VmSecurityBlock] = {}
        self._damaged: dict[uuid.UUID, str] = {}
        self._locks: WeakValueDictionary[uuid.UUID, asyncio.Lock] = WeakValueDictionary()

    def load(self) -> None:
        """Reads all blocks at start. A damaged one is kept apart and named; the others are not disturbed."""
        for name in self._store.names(_RECORD_PREFIX):
            vm_id = uuid.UUID(name.removeprefix(_RECORD_PREFIX))
            try:
                block = VmSecurityBlock.from_record(vm_id, self._store.read(name))
            except IntegrityError as error:
                log.error("VM %s cannot be used: %s", vm_id, error)
                self._damaged[vm_id] = str(error)
                continue
            self._blocks[vm_id] = block
            if block.vtpm_id is not None:
                self._vtpms.load(block.vtpm_id, vm_id, lambda vm_id=vm_id: self._vtpm_failed(vm_id))  # type: ignore[misc]

    async def sweep(self) -> None:
        """Removes vTPM records that no block names, those of damaged blocks that are gone. While one is there, all stay.

        For the start only: a vTPM that is being made has a record before its block is in the table.
        """
        bound = {record_name(block.vtpm_id) for block in self._blocks.values() if block.vtpm_id is not None}
        orphans = [name for name in self._store.names(VTPM_PREFIX) if name not in bound]
        if orphans and not self._damaged:
            log.warning("removing %d vTPM records that belong to no VM", len(orphans))
            await self._commit([(name, None) for name in orphans])

    def _lock(self, vm_id: uuid.UUID) -> asyncio.Lock:
        """The VM's lock; it lives as long as somebody holds it or waits for it."""
        return self._locks.setdefault(vm_id, asyncio.Lock())

    def _vtpm_failed(self, vm_id: uuid.UUID) -> None:
        block = self._blocks.get(vm_id)
        if block is not None and block.state is VmState.RUNNING:
            self._blocks[vm_id] = block.fail()

    def _block(self, vm_id: uuid.UUID) -> VmSecurityBlock:
        if vm_id in self._damaged:
            raise IntegrityError(self._damaged[vm_id])
        try:
            return self._blocks[vm_id]
        except KeyError:
            raise NotFound(f"there is no VM {vm_id}") from None

    def _vtpm(self, block: VmSecurityBlock) -> Vtpm:
        if block.vtpm_id is None:
            raise WrongState(f"VM {block.vm_id} has no vTPM")
        return self._vtpms.get(block.vtpm_id)

    async def launch(self, vm_id: uuid.UUID, *, with_vtpm: bool) -> VmInfo:
        """Makes the block and begins the first boot; with a vTPM, both become durable together.

        Raises:
            AlreadyExists: the VM has a block.
            ResourceError: the SP is full, or something is exhausted; nothing was made.
        """
        async with self._lock(vm_id):
            if vm_id in self._blocks or vm_id in self._damaged:
                raise AlreadyExists(f"VM {vm_id} has a security block already")
            if len(self._blocks) >= self._max_vms:
                raise ResourceError(f"this secure processor holds {self._max_vms} VMs at most")
            block = VmSecurityBlock.launch(vm_id)
            self._blocks[vm_id] = block
            try:
                if with_vtpm:
                    await self._create_vtpm(block)
                else:
                    await self._save(block)
            except BaseException:
                del self._blocks[vm_id]
                raise
            return self.info(vm_id)

    async def create_vtpm(self, vm_id: uuid.UUID) -> VmInfo:
        """A vTPM for a running VM that has none (C3).

        Raises:
            NotFound, AlreadyExists, WrongState: the block does not allow it.
            ResourceError: nothing was made.
        """
        async with self._lock(vm_id):
            await self._create_vtpm(self._block(vm_id))
            return self.info(vm_id)

    async def _create_vtpm(self, block: VmSecurityBlock) -> None:
        vtpm_id = uuid.uuid4()
        bound = block.bind(vtpm_id)
        boot = self._boot(bound)
        name = _record_name(block.vm_id)
        before = block.to_record() if name in self._store else None
        binding = Binding((name, bound.to_record()), (name, before))
        await self._vtpms.create(vtpm_id, block.vm_id, boot, binding, lambda: self._vtpm_failed(block.vm_id))
        self._blocks[block.vm_id] = bound

    def _boot(self, block: VmSecurityBlock) -> tuple[bytes, bytes]:
        assert block.boot_id is not None  # noqa: S101  # a running block has one
        return block.boot_id, self._keys.boot_key(block.vm_id, block.boot_id)

    async def start(self, vm_id: uuid.UUID) -> VmInfo:
        """A new boot of a stopped VM.

        Raises:
            NotFound, WrongState: the block does not allow it.
            IntegrityError: its vTPM's stored state cannot be believed; it stays stopped.
            ResourceError: it stays stopped.
        """
        async with self._lock(vm_id):
            await self._start(self._block(vm_id))
            return self.info(vm_id)

    async def _start(self, block: VmSecurityBlock) -> None:
        started = block.start()
        self._blocks[block.vm_id] = started
        saving = asyncio.ensure_future(self._save(started))  # the disk works meanwhile
        try:
            if started.vtpm_id is not None:
                await self._vtpms.get(started.vtpm_id).power_on(*self._boot(started))
            await saving
        except SpvtpmError:
            (unsaved,) = await asyncio.gather(saving, return_exceptions=True)
            await self._stop(started)
            await self._release(started)
            if unsaved is not None:
                self._blocks[block.vm_id] = block
            raise

    async def stop(self, vm_id: uuid.UUID) -> VmInfo:
        """The VM is powered off; its vTPM is shut down in order.

        Raises:
            NotFound, WrongState: the block does not allow it.
        """
        async with self._lock(vm_id):
            await self._release(await self._stop(self._block(vm_id)))
            return self.info(vm_id)

    async def _stop(self, block: VmSecurityBlock) -> VmSecurityBlock:
        stopped = block.stop()
        if block.vtpm_id is not None:
            await self._vtpms.get(block.vtpm_id).power_off()
        self._blocks[block.vm_id] = stopped
        return stopped

    async def _release(self, block: VmSecurityBlock) -> None:
        if block.vtpm_id is not None:
            await self._vtpms.get(block.vtpm_id).release()

    async def reset(self, vm_id: uuid.UUID) -> VmInfo:
        """Ends the boot under way and begins a new one; the interface stays, every old frame is dead.

        Raises:
            as `stop` and `start`.
        """
        async with self._lock(vm_id):
            await self._start(await self._stop(self._block(vm_id)))
            return self.info(vm_id)

    async def decommission(self, vm_id: uuid.UUID) -> None:
        """Destroys block, vTPM and storage. Of a damaged block nobody can tell whose vTPM it was: that goes at the next start.

        Raises:
            NotFound: there is none.
            StorageError: they are still there.
        """
        async with self._lock(vm_id):
            removal = (_record_name(vm_id), None)
            block = self._blocks.get(vm_id)
            if block is None and vm_id not in self._damaged:
                raise NotFound(f"there is no VM {vm_id}")
            if block is not None and block.vtpm_id is not None:
                await self._vtpms.destroy(block.vtpm_id, [removal])
            else:
                await self._commit([removal])
            self._blocks.pop(vm_id, None)
            self._damaged.pop(vm_id, None)

    async def destroy_vtpm(self, vm_id: uuid.UUID) -> VmInfo:
        """Destroys the VM's vTPM; the VM goes on without.

        Raises:
            NotFound, WrongState: there is none.
            StorageError: it is still there.
        """
        async with self._lock(vm_id):
            block = self._block(vm_id)
            vtpm = self._vtpm(block)
            unbound = block.unbind()
            await self._vtpms.destroy(vtpm.vtpm_id, [(_record_name(vm_id), unbound.to_record())])
            self._blocks[vm_id] = unbound
            return self.info(vm_id)

    async def park(self, vm_id: uuid.UUID) -> VmInfo:
        """Parks the VM's vTPM.

        Raises:
            NotFound, WrongState: it is not active.
            WorkerError: it died; the VM has failed.
        """
        async with self._lock(vm_id):
            if not await self._vtpm(self._block(vm_id)).park():
                raise WrongState(f"the vTPM of VM {vm_id} has an NV change that is not durable yet")
            return self.info(vm_id)

    async def wake(self, vm_id: uuid.UUID) -> VmInfo:
        """Wakes the VM's parked vTPM.

        Raises:
            NotFound, WrongState: it is not parked.
            WorkerError: it died; the VM has failed.
        """
        async with self._lock(vm_id):
            await self._vtpm(self._block(vm_id)).wake()
            return self.info(vm_id)

    def info(self, vm_id: uuid.UUID) -> VmInfo:
        """One VM as the hypervisor may see it.

        Raises:
            NotFound: there is none.
        """
        if vm_id in self._damaged:
            return VmInfo(vm_id, "damaged", 0, None)
        block = self._block(vm_id)
        return VmInfo(vm_id, block.state.value, block.boots, self._vtpm_info(block))

    def _vtpm_info(self, block: VmSecurityBlock) -> VtpmInfo | None:
        if block.vtpm_id is None:
            return None
        vtpm = self._vtpms.get(block.vtpm_id)
        path = "" if vtpm.interface is None else str(vtpm.interface.path)
        connected = vtpm.interface is not None and vtpm.interface.connected
        return VtpmInfo(vtpm.vtpm_id, vtpm.residency.value, path, connected, vtpm.failure)

    def list(self, after: uuid.UUID | None) -> VmList:
        """A page of VMs, ordered by id: those after `after`."""
        following = sorted(vm_id for vm_id in (*self._blocks, *self._damaged) if after is None or vm_id > after)
        page = [self.info(vm_id) for vm_id in following[:PAGE_VMS]]
        return VmList(page, more=len(following) > len(page))

    def residents(self) -> tuple[int, int, int]:
        """How many VMs there are, and how many active and parked vTPMs."""
        count = self._vtpms.count()
        return len(self._blocks) + len(self._damaged), count[Residency.ACTIVE], count[Residency.PARKED]

    async def _save(self, block: VmSecurityBlock) -> None:
        await self._commit([(_record_name(block.vm_id), block.to_record())])
