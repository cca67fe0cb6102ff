"""The TPM behind the sockets: a confined worker process, as in the secure processor, whose state is sealed in a directory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NoReturn

from spvtpm.embedded import StateDirectory
from spvtpm.processor.interfaces.emulation import Emulation
from spvtpm.processor.worker.messages import Endorse, Off, PowerOff, Start
from spvtpm.processor.worker_pool import WorkerPool
from spvtpm.processor.worker_session import WorkerSession
from spvtpm.wire.errors import StorageError, WorkerError, WrongState

log = logging.getLogger(__name__)


class Power:
    """Switches one TPM on and off.

    Args:
        pool: gives workers.
        storage: keeps the TPM's state.
    """

    def __init__(self, pool: WorkerPool, storage: StateDirectory) -> None:
        self.emulation = Emulation(self, "TPM")
        self._pool = pool
        self._storage = storage
        self._lock = asyncio.Lock()
        self._session: WorkerSession | None = None

    async def switch_on(self) -> None:
        """The TPM begins anew; the first time ever, as a new one.

        Raises:
            WrongState: it is on.
            StorageError: its state cannot be read.
            WorkerError: it does not begin.
        """
        async with self._lock:
            if self._session is not None:
                raise WrongState("the TPM is on")
            start = Start(self.emulation.stream_port(), self._storage.load())
            self.emulation.leave_to_worker()
            session = WorkerSession(await self._pool.take(), "the TPM", self._commit, self._notice_end)
            try:
                await session.start(start, self.emulation.descriptors(), None)
            except WorkerError:
                await session.end()
                self.emulation.rest()
                raise
            self._session = session

    async def switch_off(self) -> None:
        """The TPM ends in order, if it was on."""
        async with self._lock:
            session, self._session = self._session, None
            if session is None:
                return
            try:
                if not isinstance(await session.order(PowerOff()), Off):
                    log.warning("the TPM did not end in order")
            except WorkerError as error:
                log.warning("the TPM did not end in order: %s", error)
            await session.end()
            self.emulation.rest()

    async def _commit(self, permanent: bytes) -> None:
        await asyncio.to_thread(self._storage.save, permanent)

    async def _notice_end(self, reason: str) -> None:
        log.error("the TPM failed: %s; INIT begins it again", reason)
        self.emulation.fail()


@asynccontextmanager
async def powering(state: Path) -> AsyncIterator[Power]:
    """The power of the TPM whose state is in that directory; it is off at the end.

    Raises:
        StorageError: the directory cannot be used, is damaged, or has a state of swtpm's own.
        StateInUse: another process uses it.
        WorkerError: this machine cannot run workers.
    """
    if any(state.glob("tpm2-*")):
        raise StorageError(f"{state} has a state of swtpm's in it, which only swtpm can read")
    async with AsyncExitStack() as cleanup:
        storage = StateDirectory(state)
        cleanup.callback(storage.close)
        pool = WorkerPool(0, _certify)
        cleanup.callback(pool.close)
        await pool.open()
        power = Power(pool, storage)
        cleanup.callback(power.emulation.close_ends)
        cleanup.push_async_callback(power.switch_off)
        yield power


def _certify(_new: Endorse) -> NoReturn:
    raise WorkerError("no TPM is made ahead of need here, so none is certified")
