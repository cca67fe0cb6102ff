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

from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.wire.errors import AlreadyExists, IntegrityError, NotFound, ResourceError

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
        max_vms: blocks at a time.
    """

    def __init__(self, max_vms: int) -> None:
        self._max_vms = max_vms
        self._blocks: dict[uuid.UUID, VmSecurityBlock] = {}
        self._damaged: dict[uuid.UUID, str] = {}
        self._coming: set[uuid.UUID] = set()
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

    def put(self, block: VmSecurityBlock) -> None:
        """The block as it is from now on."""
        self._blocks[block.vm_id] = block

    def remove(self, vm_id: uuid.UUID) -> None:
        """The block is gone."""
        del self._blocks[vm_id]

    def check_room(self, vm_id: uuid.UUID) -> None:
        """Whether a new block of this id can be made.

        Raises:
            AlreadyExists: the VM has one.
            ResourceError: the table is full.
        """
        if vm_id in self._blocks or vm_id in self._damaged or vm_id in self._coming:
            raise AlreadyExists(f"VM {vm_id} has a security block already")
        if len(self) + len(self._coming) >= self._max_vms:
            raise ResourceError(f"this secure processor holds {self._max_vms} VMs at most")

    @asynccontextmanager
    async def room_for(self, block: VmSecurityBlock) -> AsyncIterator[None]:
        """Holds a place for the new block; nobody sees it there before the body has made it durable.

        Raises:
            AlreadyExists: the VM has one.
            ResourceError: the table is full.
        """
        self.check_room(block.vm_id)
        self._coming.add(block.vm_id)
        try:
            yield
            self.put(block)
        finally:
            self._coming.discard(block.vm_id)

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
