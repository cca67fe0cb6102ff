"""What an owner may do with his VMs: have them, list them, destroy them, change his secret. Exports and imports: `instances.py`.

The caller has seen the owner's key in the channel. A VM of somebody else is answered as one that does not exist.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

from spvtpm.processor.allowed import Here
from spvtpm.processor.channel_order import Turn
from spvtpm.processor.launch_secrets import LaunchSecrets
from spvtpm.processor.ledger import Entry, Ledger
from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.processor.ownership import Ownership
from spvtpm.processor.pcr_banks import check_pcr_banks
from spvtpm.processor.rollback_guard import RollbackGuard
from spvtpm.processor.security_block import VmSecurityBlock
from spvtpm.processor.sp_secret import SpSecret
from spvtpm.processor.vm_table import VmTable, block_change, block_removal
from spvtpm.processor.vtpm_manager import VtpmManager
from spvtpm.processor.vtpm_records import record_name
from spvtpm.wire.errors import IntegrityError, NotFound, StaleInstance
from spvtpm.wire.messages import Endorsement
from spvtpm.wire.owner_messages import (
    PAGE_MY_VMS,
    Events,
    Fate,
    MyVm,
    MyVms,
    NewVtpm,
    Provision,
    Rotated,
)


@dataclass(frozen=True, slots=True)
class Estate:
    """What the owners' commands work on.

    Attributes:
        store: where states are kept, for reading.
        guard: makes changes durable that must never be undone.
        table: the security blocks.
        vtpms: the vTPM manager.
        ledger: of vTPMs that are gone.
        secrets: of the VMs that run.
        here: this chip, and what runs on it.
        sp_secret: the chip's half of the keys of instance files.
    """

    store: NvStore
    guard: RollbackGuard
    table: VmTable
    vtpms: VtpmManager
    ledger: Ledger
    secrets: LaunchSecrets
    here: Here
    sp_secret: SpSecret

    def owned(self, owner: bytes, vm_id: uuid.UUID) -> VmSecurityBlock:
        """The block of one of the owner's VMs.

        Raises:
            NotFound: there is none, or it is somebody else's.
            IntegrityError: it is damaged, so that nobody knows whose it is.
        """
        block = self.table.get(vm_id)
        if block.ownership.owner != owner:
            raise NotFound(f"there is no VM {vm_id}")
        return block

    def check_absent(self, vtpm_id: uuid.UUID) -> None:
        """Whether a vTPM that shall come is not here already.

        Raises:
            StaleInstance: it is.
        """
        if record_name(vtpm_id) in self.store or self.vtpms.has(vtpm_id):
            raise StaleInstance(f"vTPM {vtpm_id} lives in this secure processor already")

    def view(self, block: VmSecurityBlock) -> MyVm:
        """One VM as its owner sees it."""
        vtpm = None if block.vtpm_id is None else self.vtpms.get(block.vtpm_id)
        return MyVm(
            vm_id=block.vm_id,
            state=block.state.value,
            boots=block.boots,
            label=block.ownership.label,
            vtpm_id=block.vtpm_id,
            residency="" if vtpm is None else vtpm.residency.value,
            version=block.version,
            policy=block.ownership.policy,
        )

    async def remove(self, block: VmSecurityBlock, entry: Entry | None, turn: Turn) -> None:
        """Destroys block, vTPM and secrets, for good. The caller holds the VM's lock.

        Args:
            block: of the VM.
            entry: what the ledger shall say of its vTPM, if it has one.
            turn: of the channel in which its owner wants it.

        Raises:
            StaleInstance: the channel is out of date.
            StorageError: they are still there, but for the boot under way.
        """
        turn.change(block.vm_id)
        removal = block_removal(block.vm_id)
        if block.vtpm_id is None:
            await self.guard.milestone([removal])
        else:
            # Ahead of the ledger's lock: one that hangs keeps no other owner waiting.
            await self.vtpms.get(block.vtpm_id).abandon()
            async with self.ledger.lock:
                turn.change(block.vm_id)  # again: meanwhile its owner may have gone on in another
                changes: list[Change] = [removal, self.ledger.change(block.vtpm_id, entry)]
                await self.vtpms.destroy(block.vtpm_id, changes, self.guard.milestone)
        self.table.remove(block.vm_id)
        self.secrets.withdraw(block.vm_id)


class OwnerCommands:
    """Commands of one owner.

    Args:
        estate: what they work on.
        owner: fingerprint of the owner's key, 32 bytes.
        turn: of the channel in which they come.
    """

    def __init__(self, estate: Estate, owner: bytes, turn: Turn) -> None:
        self._estate = estate
        self._owner = owner
        self._turn = turn

    async def provision(self, request: Provision, vtpm: NewVtpm) -> MyVm:
        """Makes the security block of a VM whose vTPM is made when the hypervisor launches it.

        Raises:
            AlreadyExists: the VM has one.
            NotAdmitted: its host has not announced it.
            TooMany: this owner has as many as he may have.
            ChipNotAllowed, FirmwareTooOld: the policy does not allow this chip.
            PcrBankUnknown: it asks for a PCR bank that there is none of.
            ResourceError: there is no room.
        """
        estate = self._estate
        estate.here.check(vtpm.policy)
        check_pcr_banks(vtpm.policy.pcr_banks)
        ownership = Ownership(
            owner=self._owner,
            user_secret=request.user_secret,
            vm_key=request.vm_key,
            policy=vtpm.policy,
            label=vtpm.label,
            inject_key=request.inject_key,
        )
        block = VmSecurityBlock.provision(request.vm_id, ownership)
        async with estate.table.lock(request.vm_id), estate.table.room_for(block):
            await estate.guard.milestone([block_change(block)])
        return estate.view(block)

    async def destroy(self, vm_id: uuid.UUID) -> None:
        """Destroys a VM's block, vTPM and secrets.

        Raises:
            NotFound: this owner has none of this id.
            StaleInstance: the channel is out of date.
            StorageError: they are still there.
        """
        estate = self._estate
        async with estate.table.lock(vm_id):
            block = estate.owned(self._owner, vm_id)
            entry = Entry(self._owner, "destroyed", block.version, block.version + 1, None)
            await estate.remove(block, entry, self._turn)

    async def rotate(self, user_secret: bytes) -> Rotated:
        """Another `UserSecret` for all of the owner's VMs, all or none.

        Raises:
            StaleInstance: the channel is out of date.
            StorageError: for none.
        """
        table = self._estate.table
        async with AsyncExitStack() as locks:
            held = sorted(block.vm_id for block in self._mine())
            for vm_id in held:
                await locks.enter_async_context(table.lock(vm_id))
            self._turn.change(None)
            rotated = [block.rotate(user_secret) for block in self._mine() if block.vm_id in held]
            if rotated:  # a counter wears
                await self._estate.guard.milestone([block_change(block) for block in rotated])
            for block in rotated:
                table.put(table.get(block.vm_id).rotate(user_secret))  # its vTPM may have died meanwhile
        return Rotated(vms=len(rotated))

    def list(self, after: uuid.UUID | None) -> MyVms:
        """A page of the owner's VMs, ordered by id: those after `after`."""
        following = sorted(
            (block for block in self._mine() if after is None or block.vm_id > after), key=lambda block: block.vm_id
        )
        page = [self._estate.view(block) for block in following[:PAGE_MY_VMS]]
        return MyVms(vms=page, more=len(following) > len(page))

    async def fate(self, vtpm_id: uuid.UUID) -> Fate:
        """What became of a vTPM here. No import or acknowledgement in an older channel changes it any more.

        Raises:
            IntegrityError: the ledger is damaged, or the vTPM is here and the block of its VM is.
        """
        async with self._estate.ledger.lock:  # an import under way in another channel is done, or refused afterwards
            self._turn.outdate_others()
            return self._fate(vtpm_id)

    def _fate(self, vtpm_id: uuid.UUID) -> Fate:
        bound = next((block for block in self._estate.table if block.vtpm_id == vtpm_id), None)
        if bound is not None and bound.ownership.owner == self._owner:
            return Fate(vtpm_id=vtpm_id, state="here", version=bound.version)
        if bound is None and record_name(vtpm_id) in self._estate.store:
            # With its block put right again it would live: whoever was told that it never came would give it a second life.
            raise IntegrityError(f"vTPM {vtpm_id} is here, but the security block of its VM is damaged")
        entry = self._estate.ledger.find(vtpm_id)
        if entry is None or entry.owner != self._owner:
            return Fate(vtpm_id=vtpm_id, state="unknown", version=0)
        return Fate(vtpm_id=vtpm_id, state=entry.how, version=entry.version, sha256=entry.sha256, chip=entry.chip)

    def endorsement(self, vm_id: uuid.UUID) -> Endorsement:
        """The certificates of the EKs of a VM's vTPM.

        Raises:
            NotFound: this owner has no VM of this id, or it has no vTPM.
            IntegrityError: the record is missing or altered.
        """
        block = self._estate.owned(self._owner, vm_id)
        if block.vtpm_id is None:
            raise NotFound(f"VM {vm_id} has no vTPM")
        return self._estate.vtpms.endorsement(block.vtpm_id)

    def _mine(self) -> Iterator[VmSecurityBlock]:
        return (block for block in self._estate.table if block.ownership.owner == self._owner)

    def events(self, vm_id: uuid.UUID) -> Events:
        """The VM's newest events.

        Raises:
            NotFound: this owner has none of this id.
        """
        return Events(events=list(self._estate.owned(self._owner, vm_id).events))
