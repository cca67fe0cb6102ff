"""Commits of the event loop: those of one turn go together; a single one, on a quick disk, is not sent to another thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.wire.errors import StorageError

_Waiting = tuple[Sequence[Change], "asyncio.Future[None]"]


class GroupCommit:
    """The event loop's way to the NV store.

    Handing a commit to the writer thread and hearing of its end costs two wake-ups, nearly as much as a quick disk takes to
    sync. A slow disk, or a commit that others wait beside, is the thread's: the loop goes on meanwhile.

    Args:
        store: closed by its owner.
    """

    def __init__(self, store: NvStore) -> None:
        self._store = store
        self._waiting: list[_Waiting] = []

    async def commit(self, changes: Sequence[Change]) -> None:
        """Returns once the changes are durable, all of them.

        Raises:
            StorageError: none of them is.
        """
        loop = asyncio.get_running_loop()
        durable: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((changes, durable))
        await durable

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1 and self._is_done_at_once(*waiting[0]):
            return
        for changes, durable in waiting:
            asyncio.wrap_future(self._store.commit(changes)).add_done_callback(partial(_pass_on, durable))

    def _is_done_at_once(self, changes: Sequence[Change], durable: asyncio.Future[None]) -> bool:
        try:
            if not self._store.commit_at_once(changes):
                return False
        except StorageError as error:
            if not durable.done():
                durable.set_exception(error)
            return True
        if not durable.done():
            durable.set_result(None)
        return True


def _pass_on(durable: asyncio.Future[None], handed_in: asyncio.Future[None]) -> None:
    error = handed_in.exception()
    if durable.done():  # nobody waits any more
        return
    if error is None:
        durable.set_result(None)
    else:
        durable.set_exception(error)
