"""Against the whole NV store being put back to an older copy of itself: it counts along with the chip's monotonic counter.

The store has an epoch, a record like any other. A *milestone* writes its changes and the next epoch in one transaction, then has
the counter catch up; only then is it acknowledged. So the store is never behind the counter, and at most one ahead, after a
crash between the two. A copy from before the last milestone is behind, and refused.

What must never come back is a milestone: an import, an export, a destruction, a hibernation, a resumption. What a guest writes
is not, for counters are slow and wear: between two milestones a copy of the store can stand in for a later one. So there is
one at each start, and one at the counter's pace while anything was written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from spvtpm.processor.fuses import MonotonicCounter
from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.processor.vtpm_services import Commit
from spvtpm.wire.errors import FusesError, IntegrityError, StorageError

log = logging.getLogger(__name__)

_RECORD = "epoch"
_EPOCH_BYTES = 8
_RETRY_S = 1.0
_CLOSE_PATIENCE_S = 5.0


def check_epoch(store: NvStore, counter: MonotonicCounter) -> None:
    """Whether the store is as new as the counter says; before anything in it is believed.

    Raises:
        IntegrityError: it is older, or the counter was set back.
        FusesError: the counter cannot be read.
    """
    epoch, counted = _epoch(store), counter.read()
    if epoch < counted:
        raise IntegrityError(
            f"the NV store was put back to an older copy: it is in epoch {epoch}, and the chip has counted to {counted}"
        )
    if epoch > counted + 1:
        raise IntegrityError(
            f"the chip's counter was set back: it stands at {counted}, and the NV store is in epoch {epoch}"
        )


def _epoch(store: NvStore) -> int:
    return int.from_bytes(store.read(_RECORD), "big") if _RECORD in store else 0


class RollbackGuard:
    """Commits milestones.

    Args:
        store: checked by `check_epoch`.
        commit: makes changes to it durable.
        counter: the chip's.
    """

    def __init__(self, store: NvStore, commit: Commit, counter: MonotonicCounter) -> None:
        self._store = store
        self._commit = commit
        self._counter = counter
        self._lock = asyncio.Lock()
        self._under_way = set[asyncio.Future[None]]()
        self._epoch = _epoch(store)
        self._counted: int | None = (
            None  # where the counter stands, once that is known: asking it may take as long as a step
        )

    async def milestone(self, changes: Sequence[Change]) -> None:
        """Returns once the changes are durable, and every older copy of the store is worthless.

        What is durable cannot be taken back, so a counter that does not answer then is waited for. Whoever is cancelled meanwhile
        ends waiting, and the milestone goes on: a step of the counter that nobody waits for any more would be taken twice, and
        the store be behind for ever.

        Raises:
            StorageError: the changes are not durable.
        """
        under_way = asyncio.ensure_future(self._reach(changes))
        self._under_way.add(under_way)
        under_way.add_done_callback(self._under_way.discard)
        await asyncio.shield(under_way)

    async def _reach(self, changes: Sequence[Change]) -> None:
        async with self._lock:
            await self._catch_up()
            epoch = self._epoch + 1
            await self._commit([*changes, (_RECORD, epoch.to_bytes(_EPOCH_BYTES, "big"))])
            self._epoch = epoch
            await self._catch_up()

    async def _catch_up(self) -> None:
        """The store may be one ahead: a milestone just now, or a crash before the counter was reached."""
        while True:
            try:
                if self._counted is None:
                    self._counted = await asyncio.to_thread(self._counter.read)
                if self._counted < self._epoch:
                    self._counted = await asyncio.to_thread(self._counter.increment)
                return
            except FusesError as error:
                self._counted = None
                log.error("the chip's counter does not answer, and lifecycles wait for it: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def keep_pace(self) -> None:
        """A milestone now, and then whenever something was written, at the counter's pace; until cancelled."""
        while True:
            if self._store.transactions != self._store.version(_RECORD):
                try:
                    await self.milestone([])
                except StorageError as error:
                    log.error("the chip's counter does not keep pace: %s", error)
            await asyncio.sleep(self._counter.pace_s)

    async def close(self) -> None:
        """A last milestone, so that nothing can stand in for what was written last; not waited for without end."""
        try:
            async with asyncio.timeout(_CLOSE_PATIENCE_S):
                await self.milestone([])
        except (StorageError, TimeoutError) as error:
            log.error("the NV store's last changes are not safe from being put back: %s", error or "no answer")
