"""A side of a handoff whose durable step is in doubt goes no other way."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

import pytest

from spvtpm.processor.migration.handoff import SOURCE, Act, Event, State
from spvtpm.processor.migration.side import Side
from spvtpm.wire.errors import IntegrityError, NotFound, StorageError, WrongState

pytestmark = [pytest.mark.claim("B9"), pytest.mark.attack("A16")]


class Source:
    """A source that has stopped its vTPM, and what it did since."""

    def __init__(self) -> None:
        self.done: list[Act] = []
        self.durable: list[State] = []
        self.refusal: Exception | None = None
        self.stored = asyncio.Event()
        self.stored.set()
        acts = {act: self._doing(act) for act in Act}
        self.side = Side(uuid.uuid4(), bytes(16), State.STOPPED, SOURCE, acts, self._store)

    def _doing(self, act: Act) -> Callable[[], Awaitable[None]]:
        async def do() -> None:
            self.done.append(act)

        return do

    async def _store(self, state: State) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.durable.append(state)
        await self.stored.wait()


async def _tries_to_keep_it(source: Source) -> None:
    for event in (Event.CANCEL, Event.LINK_LOST):
        with pytest.raises(WrongState):
            await source.side.advance(event)
    assert (source.done, source.side.state) == ([], State.STOPPED)
    await source.side.advance(Event.PREPARED)
    assert (source.done[0], source.side.state) == (Act.TELL_COMMIT, State.GONE)


def test_what_was_not_waited_for_may_be_durable_so_the_vtpm_is_not_run_again() -> None:
    async def act() -> None:
        source = Source()
        source.stored.clear()
        giving_up = asyncio.ensure_future(source.side.advance(Event.PREPARED))
        await asyncio.sleep(0)
        giving_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await giving_up
        source.stored.set()
        await _tries_to_keep_it(source)

    asyncio.run(act())


def test_what_could_not_be_stored_may_be_durable_so_the_vtpm_is_not_run_again() -> None:
    async def act() -> None:
        source = Source()
        source.refusal = StorageError("the disk says no")
        with pytest.raises(StorageError):
            await source.side.advance(Event.PREPARED)
        source.refusal = None
        await _tries_to_keep_it(source)

    asyncio.run(act())


def test_what_is_refused_before_anything_is_written_leaves_nothing_in_doubt() -> None:
    async def act() -> None:
        for refusal in (IntegrityError("the ledger is damaged"), NotFound("there is no vTPM")):
            source = Source()
            source.refusal = refusal
            with pytest.raises(type(refusal)):
                await source.side.advance(Event.PREPARED)
            await source.side.advance(Event.CANCEL)
            assert source.side.state is State.ABORTED

    asyncio.run(act())
