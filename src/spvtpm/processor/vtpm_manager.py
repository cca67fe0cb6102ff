"""All vTPMs of one SP: create, load, destroy, park, wake. Knows which vTPM serves which VM only as the VMSB says."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass

from spvtpm.processor.nv_store import Change
from spvtpm.processor.vtpm import Residency, Vtpm, VtpmServices, record_name
from spvtpm.wire.errors import NotFound, SpvtpmError, StorageError

log = logging.getLogger(__name__)

_AT_A_TIME = 32


@dataclass(frozen=True, slots=True)
class Binding:
    """The NV change that binds a vTPM to its VM, and the one that undoes it."""

    made: Change
    undone: Change


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

    def get(self, vtpm_id: uuid.UUID) -> Vtpm:
        """The vTPM.

        Raises:
            NotFound: there is none with this id.
        """
        try:
            return self._vtpms[vtpm_id]
        except KeyError:
            raise NotFound(f"there is no vTPM {vtpm_id}") from None

    def count(self) -> Counter[Residency]:
        """How many vTPMs live where."""
        return Counter(vtpm.residency for vtpm in self._vtpms.values())

    def load(self, vtpm_id: uuid.UUID, vm_id: uuid.UUID, on_failure: Callable[[], None]) -> Vtpm:
        """A vTPM known from storage, off."""
        vtpm = Vtpm(vtpm_id, vm_id, self._services, on_failure)
        self._vtpms[vtpm_id] = vtpm
        return vtpm

    async def create(
        self,
        vtpm_id: uuid.UUID,
        vm_id: uuid.UUID,
        boot: tuple[bytes, bytes],
        binding: Binding,
        on_failure: Callable[[], None],
    ) -> Vtpm:
        """Makes a new vTPM and powers it on; its state and the binding become durable together or not at all.

        Args:
            vtpm_id: new.
            vm_id: the VM it will serve for ever.
            boot: boot id (16 bytes) and boot key (32 bytes).
            binding: of the vTPM to its VM.
            on_failure: told when the vTPM dies by itself.

        Raises:
            StorageError, WorkerError, ResourceError: nothing was made.
        """
        vtpm = Vtpm(vtpm_id, vm_id, self._services, on_failure)
        try:
            await vtpm.manufacture(*boot, [binding.made])
        except SpvtpmError:
            # The worker may have died after its first commit.
            undone = self._services.store.commit([(record_name(vtpm_id), None), binding.undone])
            with suppress(StorageError):
                await asyncio.wrap_future(undone)
            raise
        self._vtpms[vtpm_id] = vtpm
        return vtpm

    async def destroy(self, vtpm_id: uuid.UUID, with_changes: Sequence[Change]) -> None:
        """Destroys a vTPM; its record goes together with `with_changes`.

        Raises:
            NotFound: there is none.
            StorageError: nothing was destroyed but the boot under way.
        """
        vtpm = self.get(vtpm_id)
        await vtpm.abandon()
        changes = [(record_name(vtpm_id), None), *with_changes]
        await asyncio.wrap_future(self._services.store.commit(changes))
        del self._vtpms[vtpm_id]

    async def park_idle_for_ever(self) -> None:
        """Parks what is idle, until cancelled."""
        while True:
            await asyncio.sleep(self._park_after_s)
            await self._with_each(self._park_idle)

    @staticmethod
    async def _park_idle(vtpm: Vtpm) -> None:
        if vtpm.residency is Residency.ACTIVE:
            with suppress(SpvtpmError):  # what happened to it meanwhile is logged where it happened
                await vtpm.park(only_if_idle=True)

    async def close(self) -> None:
        """Shuts every vTPM down in order and gives its interface back."""

        async def end(vtpm: Vtpm) -> None:
            await vtpm.power_off()
            await vtpm.release()

        await self._with_each(end)

    async def _with_each(self, act: Callable[[Vtpm], Coroutine[None, None, None]]) -> None:
        """Acts on all vTPMs, some side by side: one that hangs keeps no other waiting."""
        room = asyncio.Semaphore(_AT_A_TIME)

        async def act_in_turn(vtpm: Vtpm) -> None:
            async with room:
                await act(vtpm)

        async with asyncio.TaskGroup() as group:
            for vtpm in list(self._vtpms.values()):
                group.create_task(act_in_turn(vtpm))
