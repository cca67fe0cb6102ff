"""All vTPMs of one SP: create, load, destroy, park, wake. Knows which vTPM serves which VM only as the VMSB says."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from spvtpm.processor.endorser import read_endorsement
from spvtpm.processor.nv_store import Change
from spvtpm.processor.residency import Residency
from spvtpm.processor.security_block import VmSecurityBlock
from spvtpm.processor.vtpm import Vtpm
from spvtpm.processor.vtpm_records import record_names
from spvtpm.processor.vtpm_services import Boot, Commit, VtpmServices
from spvtpm.wire.errors import NotFound, SpvtpmError, StorageError, WrongState
from spvtpm.wire.messages import Endorsement

log = logging.getLogger(__name__)

_AT_A_TIME = 32
_SHUTDOWN_S = 10.0
"""Longer than a command that runs long takes."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The NV change that binds a vTPM to its VM, and the one that undoes it."""

    made: Change
    undone: Change


def _removal(vtpm_id: uuid.UUID) -> list[Change]:
    """Of all that is kept of a vTPM."""
    return [(name, None) for name in record_names(vtpm_id)]


class VtpmManager:
    """Owns the vTPMs.

    Args:
        services: what they share.
        park_after_s: an active vTPM that did nothing for this long is parked.
    """

    def __init__(self, services: VtpmServices, park_after_s: float) -> None:
        self._services = services
        self._park_after_s = park_after_s
        self._vtpms: dict[uuid.UUID, Vtpm] = {}
        self._parking: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(_AT_A_TIME)

    def get(self, vtpm_id: uuid.UUID) -> Vtpm:
        """The vTPM.

        Raises:
            NotFound: there is none with this id.
        """
        try:
            return self._vtpms[vtpm_id]
        except KeyError:
            raise NotFound(f"there is no vTPM {vtpm_id}") from None

    def of(self, block: VmSecurityBlock) -> Vtpm:
        """The vTPM that a VM's security block names.

        Raises:
            WrongState: it names none.
        """
        if block.vtpm_id is None:
            raise WrongState(f"VM {block.vm_id} has no vTPM")
        return self.get(block.vtpm_id)

    def has(self, vtpm_id: uuid.UUID) -> bool:
        """Whether the vTPM is here, or coming."""
        return vtpm_id in self._vtpms

    def endorsement(self, vtpm_id: uuid.UUID) -> Endorsement:
        """The certificates of a vTPM's EKs as this SP keeps them: what the guest has in his NV does not matter here.

        Raises:
            IntegrityError: they are missing or altered.
        """
        kept = read_endorsement(self._services.store, vtpm_id)
        return Endorsement(vtpm_id=vtpm_id, certificates=kept.certificates, issuer=kept.issuer)

    def count(self) -> Counter[Residency]:
        """How many vTPMs live where."""
        return Counter(vtpm.residency for vtpm in self._vtpms.values())

    def load(self, vtpm_id: uuid.UUID, vm_id: uuid.UUID) -> Vtpm:
        """A vTPM known from storage, off."""
        vtpm = Vtpm(vtpm_id, vm_id, self._services)
        self._vtpms[vtpm_id] = vtpm
        return vtpm

    async def create(
        self,
        vm_id: uuid.UUID,
        boot: Boot,
        bind: Callable[[uuid.UUID], Binding],
        pcr_banks: Collection[str] = (),
    ) -> Vtpm:
        """Makes a new vTPM and powers it on; its state and the binding become durable together or not at all.

        Args:
            vm_id: the VM it will serve for ever.
            boot: that is under way.
            bind: the binding of a vTPM with this id to its VM.
            pcr_banks: names of the PCR banks that it has; none: as it is manufactured.

        Raises:
            PcrBankUnknown: there is no such bank; nothing was made.
            StorageError, WorkerError, ResourceError: nothing was made.
        """
        blank = await self._services.pool.take_blank()
        vtpm_id = blank.birth.vtpm_id
        vtpm, binding = Vtpm(vtpm_id, vm_id, self._services), bind(vtpm_id)
        try:
            await vtpm.begin(blank, boot, [binding.made], pcr_banks)
        except SpvtpmError:
            blank.worker.kill()
            blank.worker.close()
            # The worker may have died after its first commit.
            with suppress(StorageError):
                await self._services.commit([*_removal(vtpm_id), binding.undone])
            raise
        self._vtpms[vtpm_id] = vtpm
        return vtpm

    async def destroy(self, vtpm_id: uuid.UUID, with_changes: Sequence[Change], commit: Commit) -> None:
        """Destroys a vTPM that was abandoned; its records go together with `with_changes`.

        Args:
            vtpm_id: of the vTPM.
            with_changes: what else is to be durable then.
            commit: makes it so.

        Raises:
            NotFound: there is none.
            StorageError: nothing was destroyed.
        """
        self.get(vtpm_id)
        await commit([*_removal(vtpm_id), *with_changes])
        del self._vtpms[vtpm_id]

    async def forget(self, vtpm_id: uuid.UUID) -> None:
        """Ends a vTPM that has not come after all; what was written of it goes."""
        await self.get(vtpm_id).abandon()
        with suppress(StorageError):  # the next start removes it
            await self._services.commit(_removal(vtpm_id))
        del self._vtpms[vtpm_id]  # at last: until then no other of this id can come, whose records would go

    async def park_idle_for_ever(self) -> None:
        """Parks what is idle, until cancelled. One that hangs keeps no other waiting, nor the next round."""
        while True:
            await asyncio.sleep(self._park_after_s)
            for vtpm in list(self._vtpms.values()):
                if vtpm.residency is Residency.ACTIVE and vtpm.vtpm_id not in self._parking:
                    task = self._parking[vtpm.vtpm_id] = asyncio.create_task(self._park_idle(vtpm))
                    task.add_done_callback(partial(self._parked, vtpm.vtpm_id))

    def _parked(self, vtpm_id: uuid.UUID, _task: asyncio.Task[None]) -> None:
        del self._parking[vtpm_id]

    async def _park_idle(self, vtpm: Vtpm) -> None:
        async with self._room:
            try:
                await vtpm.park(only_if_idle=True)
            except SpvtpmError:
                return  # what happened to it meanwhile is logged where it happened

    async def close(self) -> None:
        """Shuts every vTPM down in order and gives its interface back; one that takes too long is cut off."""
        vtpms = list(self._vtpms.values())
        for outcome in await asyncio.gather(*map(self._end, vtpms), return_exceptions=True):
            if outcome is not None:
                log.error("a vTPM was not shut down in order: %r", outcome)

    async def _end(self, vtpm: Vtpm) -> None:
        async with self._room:
            try:
                async with asyncio.timeout(_SHUTDOWN_S):
                    await vtpm.power_off()
                    await vtpm.release()
            except TimeoutError:
                log.error("vTPM %s does not shut down in order: cut off", vtpm.vtpm_id)
                vtpm.cut_off()
                await vtpm.abandon()
