"""Where one vTPM lives: its interface, its worker process while it has one, and how either ends. `Vtpm` says when."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence

from spvtpm.processor.interfaces.interface import Interface
from spvtpm.processor.nv_store import Change
from spvtpm.processor.residency import Residency
from spvtpm.processor.vtpm_records import record_name
from spvtpm.processor.vtpm_services import VtpmServices
from spvtpm.processor.worker.messages import FromWorker, Park, PowerOff, Start
from spvtpm.processor.worker_pool import Worker
from spvtpm.processor.worker_session import WorkerSession
from spvtpm.wire.errors import SpvtpmError, WorkerError, WrongState

log = logging.getLogger(__name__)


class Resident:
    """One vTPM's place. Its methods are for whoever holds its lock.

    Args:
        vtpm_id: its id.
        vm_id: the VM it is bound to.
        services: what the SP shares among its vTPMs.
    """

    def __init__(self, vtpm_id: uuid.UUID, vm_id: uuid.UUID, services: VtpmServices) -> None:
        self.vtpm_id = vtpm_id
        self.vm_id = vm_id
        self.residency = Residency.OFF
        self.failure = ""
        self.interface: Interface | None = None
        self._name = f"vTPM {vtpm_id}"
        self._services = services
        self._lock = asyncio.Lock()
        self._session: WorkerSession | None = None

    async def _run_worker(
        self, worker: Worker, start: Start, changes: Sequence[Change], meanwhile: Callable[[], None] | None = None
    ) -> None:
        assert self.interface is not None  # noqa: S101  # a boot has one
        first_changes = list(changes)

        async def commit(permanent: bytes) -> None:
            changes = [(record_name(self.vtpm_id), permanent), *first_changes]
            await self._services.commit(changes)
            first_changes.clear()

        async def notice_end(reason: str) -> None:
            async with self._lock:
                if self._session is session and self.residency is Residency.ACTIVE:
                    await self._fail(reason)

        self.interface.leave_to_worker()
        session = self._session = WorkerSession(worker, self._name, commit, notice_end)
        try:
            ready = await session.start(start, self.interface.descriptors(), meanwhile)
        except SpvtpmError:
            await self._dismiss(Residency.OFF)
            raise
        self._services.pool.note_missing(ready.missing)
        self.residency = Residency.ACTIVE

    async def _order(self, order: Park | PowerOff) -> FromWorker:
        assert self._session is not None  # noqa: S101  # an active vTPM has one
        try:
            return await self._session.order(order)
        except WorkerError as error:
            await self._fail(str(error))
            raise

    async def _dismiss(self, residency: Residency) -> None:
        session, self._session = self._session, None
        self.residency = residency
        if session is not None:
            await session.end()
        if self.interface is not None and residency is Residency.OFF:
            self.interface.rest()

    async def _fail(self, reason: str) -> None:
        log.error("vTPM %s of VM %s failed: %s", self.vtpm_id, self.vm_id, reason)
        await self._dismiss(Residency.FAILED)
        self.failure = reason
        self._services.on_failure(self.vm_id, reason)
        if self.interface is not None:
            self.interface.fail()

    def _release_interface(self) -> None:
        if self.interface is not None:
            self.interface.close()
            self.interface = None

    def _require(self, residency: Residency, command: str) -> None:
        if self.residency is not residency:
            raise WrongState(f"{command}: vTPM {self.vtpm_id} is {self.residency.value}, not {residency.value}")
