"""Commits of the event loop: at once or by the thread, every one durable or refused, none lost when nobody waits any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from spvtpm.processor.group_commit import GroupCommit
from spvtpm.processor.nv_store import NvStore
from spvtpm.wire.errors import StorageError

ROOT_KEY = b"storage root key of thirty-two b"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A new store; closed."""
    NvStore.create(tmp_path / "nv.db", ROOT_KEY)
    return tmp_path / "nv.db"


def run(path: Path, act: Callable[[NvStore, GroupCommit], Coroutine[None, None, None]]) -> NvStore:
    """Plays, and opens the store anew."""
    store = NvStore(path, ROOT_KEY)
    asyncio.run(act(store, GroupCommit(store)))
    store.close()
    return NvStore(path, ROOT_KEY)


@pytest.mark.claim("C5")
def test_single_commits_are_durable_one_after_the_other(path: Path) -> None:
    async def act(_store: NvStore, group: GroupCommit) -> None:
        for number in range(50):
            await group.commit([("vtpm/a", number.to_bytes(2, "big"))])

    store = run(path, act)
    assert store.read("vtpm/a") == (49).to_bytes(2, "big")
    store.close()


@pytest.mark.claim("C5")
def test_commits_of_one_turn_are_all_durable_and_share_transactions(path: Path) -> None:
    async def act(store: NvStore, group: GroupCommit) -> None:
        before = store._versions["index/root"]
        await asyncio.gather(*(group.commit([(f"vtpm/{number}", b"x")]) for number in range(200)))
        assert store._versions["index/root"] - before < 100, "one commit for all that wait"

    store = run(path, act)
    assert len(store.names("vtpm/")) == 200
    store.close()


@pytest.mark.attack("A16")
def test_a_commit_for_which_nobody_waits_any_more_is_made_and_disturbs_no_other(path: Path) -> None:
    async def act(_store: NvStore, group: GroupCommit) -> None:
        for number in range(20):
            given_up = asyncio.ensure_future(group.commit([("vtpm/a", number.to_bytes(2, "big"))]))
            await asyncio.sleep(0)
            given_up.cancel()
            await group.commit([("vtpm/b", number.to_bytes(2, "big"))])

    store = run(path, act)
    assert store.read("vtpm/a") == store.read("vtpm/b") == (19).to_bytes(2, "big")
    store.close()


@pytest.mark.parametrize("quick", [False, True])
def test_what_the_store_refuses_is_refused_and_the_next_one_is_made(path: Path, quick: bool) -> None:
    async def act(store: NvStore, group: GroupCommit) -> None:
        store._typical_s = 0.0 if quick else 1.0
        store._writer.execute("PRAGMA max_page_count=200")
        with pytest.raises(StorageError):
            await group.commit([("vtpm/a", bytes(1_000_000))])
        await group.commit([("vtpm/a", b"small")])

    store = run(path, act)
    assert store.read("vtpm/a") == b"small"
    store.close()


def test_a_slow_disk_is_the_threads(path: Path) -> None:
    store = NvStore(path, ROOT_KEY)
    store._typical_s = 1.0
    assert not store.commit_at_once([("vtpm/a", b"x")])
    store._typical_s = 0.0
    assert store.commit_at_once([("vtpm/a", b"x")])
    assert store.read("vtpm/a") == b"x"
    store.close()


@pytest.mark.attack("A16")
def test_a_commit_that_the_writer_has_taken_up_is_not_overtaken_by_one_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the last commit of a worker that was killed would come back after its vTPM was destroyed."""
    store = NvStore(path, ROOT_KEY)
    store._typical_s = 0.0
    taken, may_write = threading.Event(), threading.Event()
    write = store._write_batch

    def pause(batch: list[Any]) -> None:
        taken.set()
        may_write.wait(30)
        write(batch)

    monkeypatch.setattr(store, "_write_batch", pause)
    written = store.commit([("vtpm/a", b"state")])
    taken.wait(30)
    overtook = store.commit_at_once([("vtpm/a", None)])
    removed = None if overtook else store.commit([("vtpm/a", None)])
    may_write.set()
    written.result(30)
    if removed is not None:
        removed.result(30)
    assert "vtpm/a" not in store
    store.close()
