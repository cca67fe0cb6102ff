"""The guard and a counter that takes its time: what is written meanwhile, and who stops waiting for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from spvtpm.processor.fuses.file import FileCounter, counter_at
from spvtpm.processor.group_commit import GroupCommit
from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.rollback_guard import RollbackGuard, check_epoch

pytestmark = [pytest.mark.attack("A15"), pytest.mark.claim("B3")]


class SlowCounter(FileCounter):
    """The counter of the fuses directory, each step of which waits until it is let go."""

    pace_s = 0.01

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.steps = 0
        self.begun, self.may = threading.Event(), threading.Event()

    def increment(self) -> int:
        self.steps += 1
        self.begun.set()
        self.may.wait(30)
        return super().increment()


class Scene:
    def __init__(self, directory: Path) -> None:
        NvStore.create(directory / "nv.db", bytes(32))
        self.store = NvStore(directory / "nv.db", bytes(32))
        (directory / "counter").write_bytes(counter_at(0))
        (directory / "counter").chmod(0o600)
        self.counter = SlowCounter(directory / "counter")
        self.commit = GroupCommit(self.store).commit
        self.guard = RollbackGuard(self.store, self.commit, self.counter)

    async def counts(self) -> None:
        """Returns while the counter is about to be stepped."""
        await asyncio.to_thread(self.counter.begun.wait, 30)
        self.counter.begun.clear()


def play(directory: Path, act: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        scene = Scene(directory)
        try:
            async with asyncio.timeout(30):
                await act(scene)
        finally:
            scene.counter.may.set()
            scene.store.close()

    asyncio.run(run())


def test_what_is_written_while_a_milestone_waits_for_the_counter_gets_one_of_its_own(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        pace = asyncio.ensure_future(scene.guard.keep_pace())
        await scene.commit([("vtpm/1", b"before")])
        await scene.counts()
        await scene.commit([("vtpm/1", b"meanwhile")])
        copy = scene.store.transactions
        scene.counter.may.set()
        while scene.store.version("epoch") < copy:
            await asyncio.sleep(0.01)
        pace.cancel()

    play(tmp_path, act)


def test_nothing_written_costs_no_step_of_the_counter(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        scene.counter.may.set()
        await scene.guard.milestone([])
        pace = asyncio.ensure_future(scene.guard.keep_pace())
        for _ in range(5):
            await asyncio.sleep(scene.counter.pace_s)
        pace.cancel()
        assert scene.counter.steps == 1

    play(tmp_path, act)


def test_a_step_of_the_counter_that_nobody_waits_for_any_more_is_not_taken_twice(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        given_up = asyncio.ensure_future(scene.guard.milestone([]))
        await scene.counts()
        given_up.cancel()
        with suppress(asyncio.CancelledError):
            await given_up
        following = asyncio.ensure_future(scene.guard.milestone([]))
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert scene.counter.steps == 1
        scene.counter.may.set()
        await following
        assert scene.counter.read() == 2
        check_epoch(scene.store, scene.counter)

    play(tmp_path, act)
