"""The table of VM security blocks: what is in it, what of it is damaged, and a lock for each VM.

Two kinds of commands work on it: the hypervisor's (`security_manager.py`) and the owner's (`owner_commands.py`).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from spvtpm.processor.admission import Admission
from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.processor.vtpm_services import Commit
from spvtpm.wire.errors import AlreadyExists, IntegrityError, NotFound, ResourceError, TooMany

log = logging.getLogger(__name__)

_RECORD_PREFIX = "vmsb/"


def block_change(block: VmSecurityBlock) -> Change:
    """The NV change that makes the block durable."""
    return f"{_RECORD_PREFIX}{block.vm_id}", block.to_record()


def block_removal(vm_id: uuid.UUID) -> Change:
    """The NV change that removes a block."""
    return f"{_RECORD_PREFIX}{vm_id}", None


class VmTable:
    """All security blocks of an SP, as they are in memory. Whoever changes one has made it durable, and holds the VM's lock.

    Args:
        admission: which VMs may come.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._blocks: dict[uuid.UUID, VmSecurityBlock] = {}
        self._damaged: dict[uuid.UUID, str] = {}
        self._coming: dict[uuid.UUID, bytes] = {}
        self._locks: WeakValueDictionary[uuid.UUID, asyncio.Lock] = WeakValueDictionary()

    def load(self, store: NvStore) -> None:
        """Reads all blocks at start. A damaged one is kept apart and named; the others are not disturbed."""
        for name in store.names(_RECORD_PREFIX):
            vm_id = uuid.UUID(name.removeprefix(_RECORD_PREFIX))
            try:
                self._blocks[vm_id] = VmSecurityBlock.from_record(vm_id, store.read(name))
            except IntegrityError as error:
                log.error("VM %s cannot be used: %s", vm_id, error)
                self._damaged[vm_id] = str(error)

    def lock(self, vm_id: uuid.UUID) -> asyncio.Lock:
        """The VM's lock; it lives as long as somebody holds it or waits for it."""
        return self._locks.setdefault(vm_id, asyncio.Lock())

    def get(self, vm_id: uuid.UUID) -> VmSecurityBlock:
        """The VM's block.

        Raises:
            NotFound: there is none.
            IntegrityError: it is damaged.
        """
        if vm_id in self._damaged:
            raise IntegrityError(self._damaged[vm_id])
        try:
            return self._blocks[vm_id]
        except KeyError:
            raise NotFound(f"there is no VM {vm_id}") from None

    def has(self, vm_id: uuid.UUID) -> bool:
        """Whether the VM has a block that can be believed."""
        return vm_id in self._blocks

    def put(self, block: VmSecurityBlock) -> None:
        """The block as it is from now on."""
        self._blocks[block.vm_id] = block

    def remove(self, vm_id: uuid.UUID) -> None:
        """The block is gone."""
        del self._blocks[vm_id]

    def check_room(self, vm_id: uuid.UUID, owner: bytes) -> None:
        """Whether a new block of this id can be made.

        Args:
            vm_id: of the VM.
            owner: whose it is to be, 32 bytes.

        Raises:
            AlreadyExists: the VM has one.
            NotAdmitted: the hypervisor has not announced it.
            TooMany: this owner has as many as he may have.
            ResourceError: the table is full.
        """
        if vm_id in self._blocks or vm_id in self._damaged or vm_id in self._coming:
            raise AlreadyExists(f"VM {vm_id} has a security block already")
        self._admission.check(vm_id)
        if len(self) + len(self._coming) >= self._admission.max_vms:
            raise ResourceError(f"this secure processor holds {self._admission.max_vms} VMs at most")
        owned = sum(block.ownership.owner == owner for block in self._blocks.values())
        if owned + list(self._coming.values()).count(owner) >= self._admission.max_vms_of_one_owner:
            most = self._admission.max_vms_of_one_owner
            raise TooMany(f"this secure processor holds {most} VMs of one owner at most")

    @asynccontextmanager
    async def room_for(self, block: VmSecurityBlock) -> AsyncIterator[None]:
        """Holds a place for the new block; nobody sees it there before the body has made it durable.

        Raises:
            as `check_room`.
        """
        self.check_room(block.vm_id, block.ownership.owner)
        self._coming[block.vm_id] = block.ownership.owner
        try:
            yield
            self.put(block)
            self._admission.has_come(block.vm_id)
        finally:
            del self._coming[block.vm_id]

    async def note(
        self, commit: Commit, vm_id: uuid.UUID, boot_id: bytes, what: str, detail: str
    ) -> VmSecurityBlock | None:
        """Makes an event of a boot durable, if that is still under way; gives the block then, otherwise None.

        Raises:
            StorageError: it is not durable.
        """
        async with self.lock(vm_id):
            block = self._blocks.get(vm_id)
            if block is None or block.boot_id != boot_id:
                return None
            noted = block.noting(what, detail)
            self.put(noted)
            await commit([block_change(noted)])
            return noted

    def fail(self, vm_id: uuid.UUID, reason: str) -> None:
        """The VM's vTPM died by itself."""
        block = self._blocks.get(vm_id)
        if block is not None and block.state is VmState.RUNNING:
            self._blocks[vm_id] = block.fail(reason)

    def is_damaged(self, vm_id: uuid.UUID) -> bool:
        """Whether the VM's stored block cannot be believed."""
        return vm_id in self._damaged

    def damaged(self) -> list[uuid.UUID]:
        """The VMs whose stored blocks cannot be believed."""
        return list(self._damaged)

    def __len__(self) -> int:
        return len(self._blocks) + len(self._damaged)

    def __iter__(self) -> Iterator[VmSecurityBlock]:
        """All blocks that can be believed."""
        return iter(list(self._blocks.values()))
