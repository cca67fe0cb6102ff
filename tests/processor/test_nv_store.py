"""NV storage: a dictionary that is durable, commits all or nothing, many at once, and survives a full disk."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.wire.errors import AlreadyInitialised, IntegrityError, StorageError
from tests.harness import is_root
from tests.throwaway import run_in_child

ROOT_KEY = b"storage root key of thirty-two b"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty store."""
    path = tmp_path / "nv.db"
    NvStore.create(path, ROOT_KEY)
    return path


@contextmanager
def opened(path: Path) -> Iterator[NvStore]:
    store = NvStore(path, ROOT_KEY)
    try:
        yield store
    finally:
        store.close()


def contents(store: NvStore, prefix: str = "vtpm/") -> dict[str, bytes]:
    return {name: store.read(name) for name in store.names(prefix)}


@contextmanager
def held_back(path: Path) -> Iterator[None]:
    """A lock on the database keeps commits waiting, so that more come together."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


# A dictionary


def test_a_new_store_is_empty_private_and_made_once(path: Path) -> None:
    with opened(path) as store:
        assert store.names("vtpm/") == store.names("vmsb/") == []
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["nv.db"]
    with pytest.raises(AlreadyInitialised):
        NvStore.create(path, ROOT_KEY)


def test_a_store_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        NvStore.create(tmp_path / "nowhere" / "nv.db", ROOT_KEY)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        NvStore.create(tmp_path / "file" / "nv.db", ROOT_KEY)


def test_what_is_left_of_an_interrupted_creation_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "nv.new").write_bytes(b"half a database")
    NvStore.create(tmp_path / "nv.db", ROOT_KEY)
    with opened(tmp_path / "nv.db") as store:
        store.commit([("vtpm/a", b"content")]).result()
        assert contents(store) == {"vtpm/a": b"content"}


@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_content_of_any_size_comes_back(path: Path, size: int) -> None:
    content = os.urandom(size)
    with opened(path) as store:
        store.commit([("vtpm/a", content)]).result()
        assert store.read("vtpm/a") == content
    with opened(path) as store:
        assert store.read("vtpm/a") == content


def test_what_was_handed_in_before_closing_is_durable(path: Path) -> None:
    with opened(path) as store:
        futures = [store.commit([(f"vtpm/{number}", b"x")]) for number in range(100)]
    assert all(future.done() and future.exception() is None for future in futures)
    with opened(path) as store:
        assert len(store.names("vtpm/")) == 100


names = st.sampled_from(["vtpm/a", "vtpm/b", "vtpm/ü", "vmsb/a", "vmsb/long-" + "x" * 200])
changes = st.lists(st.tuples(names, st.none() | st.binary(max_size=64)), max_size=6)


class DurableDictionary(RuleBasedStateMachine):
    """A store against a dictionary, with reopening and with another process's eyes."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="spvtpm-")
        self.path = Path(self.directory.name) / "nv.db"
        NvStore.create(self.path, ROOT_KEY)
        self.store = NvStore(self.path, ROOT_KEY)
        self.model: dict[str, bytes] = {}

    def _apply(self, made: list[Change]) -> None:
        for name, content in made:
            if content is None:
                self.model.pop(name, None)
            else:
                self.model[name] = content

    @rule(made=changes)
    def commit(self, made: list[Change]) -> None:
        self.store.commit(made).result()
        self._apply(made)

    @rule(batches=st.lists(changes, min_size=2, max_size=5))
    def commit_many_together(self, batches: list[list[Change]]) -> None:
        with held_back(self.path):
            futures = [self.store.commit(made) for made in batches]
        for future in futures:
            future.result()
        for made in batches:
            self._apply(made)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = NvStore(self.path, ROOT_KEY)

    @rule(name=names)
    def read_what_is_not_there(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(IntegrityError, match="is missing"):
                self.store.read(name)

    @invariant()
    def is_the_dictionary(self) -> None:
        for prefix in ("vtpm/", "vmsb/", "vtpm/a"):
            wanted = {name: content for name, content in self.model.items() if name.startswith(prefix)}
            assert contents(self.store, prefix) == wanted
            assert self.store.names(prefix) == sorted(wanted)

    def teardown(self) -> None:
        self.store.close()
        with opened(self.path) as again:
            assert contents(again) | contents(again, "vmsb/") == self.model
        self.directory.cleanup()


DurableDictionary.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestDurableDictionary = pytest.mark.claim("C5")(DurableDictionary.TestCase)


# Durable, all or nothing, many at once


@pytest.mark.attack("A16")
def test_every_connection_syncs_each_commit_to_a_write_ahead_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connections: list[sqlite3.Connection] = []

    def connect(*args: Any, **keywords: Any) -> sqlite3.Connection:
        connections.append(plain_connect(*args, **keywords))
        return connections[-1]

    plain_connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    with opened(path) as store:
        store.commit([("vtpm/a", b"x")]).result()
        assert connections
        for connection in connections:
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL. Source: sqlite.org/pragma.html
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def _commits_in_log(path: Path) -> int:
    """Transactions in a write-ahead log. Source: sqlite.org/fileformat2.html, "The Write-Ahead Log"."""
    log = path.with_name(f"{path.name}-wal").read_bytes()
    page_size = int(struct.unpack_from(">I", log, 8)[0])
    frames = range(32, len(log), 24 + page_size)
    return sum(struct.unpack_from(">I", log, frame + 4)[0] != 0 for frame in frames)


def test_commits_that_come_together_share_a_transaction(path: Path) -> None:
    with opened(path) as store:
        store.commit([("vtpm/first", b"x")]).result()
        before = _commits_in_log(path)
        with held_back(path):
            futures = [store.commit([(f"vtpm/{number:02}", b"x")]) for number in range(50)]
        for future in futures:
            future.result()
        assert len(store.names("vtpm/")) == 51
        assert 1 <= _commits_in_log(path) - before <= 2  # one that waited for the lock, the others behind it


@pytest.mark.claim("C5")
def test_many_threads_commit_and_everything_is_durable(path: Path) -> None:
    threads, rounds = 16, 20

    def work(number: int) -> None:
        for turn in range(rounds):
            store.commit([(f"vtpm/{number}", b"%d" % turn), (f"vmsb/{number}/{turn}", b"%d" % number)]).result()

    with opened(path) as store:
        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    with opened(path) as store:
        assert contents(store) == {f"vtpm/{number}": b"%d" % (rounds - 1) for number in range(threads)}
        assert len(store.names("vmsb/")) == threads * rounds


@pytest.mark.attack("A16")
def test_a_commit_that_is_under_way_when_the_process_dies_is_there_whole_or_not_at_all(path: Path) -> None:
    def commit_and_die() -> None:
        store = NvStore(path, ROOT_KEY)
        store.commit([("vtpm/acknowledged", b"x")]).result()
        for turn in range(1000):
            pair = [(f"vtpm/{turn}/{half}", os.urandom(5000)) for half in ("left", "right")]
            future = store.commit(pair)
            if turn == 30:
                os.kill(os.getpid(), 9)
            future.result()

    with pytest.raises(Exception, match="status -9"):
        run_in_child(commit_and_die)
    with opened(path) as store:
        stored = store.names("vtpm/")
        assert "vtpm/acknowledged" in stored
        pairs = {name.rpartition("/")[0] for name in stored if name.count("/") == 2}
        assert {f"vtpm/{turn}" for turn in range(30)} <= pairs
        assert {f"{pair}/{half}" for pair in pairs for half in ("left", "right")} <= set(stored)
        contents(store)


# A full disk


def _limit_files_to(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _full_and_free_again(path: Path, fill: Any, free: Any) -> None:
    with opened(path) as store:
        store.commit([("vtpm/a", b"old"), ("vtpm/b", b"old")]).result()
        fill()
        for _ in range(3):
            refused = store.commit([("vtpm/a", b"new"), ("vtpm/b", None), ("vtpm/c", os.urandom(1 << 20))])
            assert isinstance(refused.exception(), StorageError)
            assert contents(store) == {"vtpm/a": b"old", "vtpm/b": b"old"}
        free()
        store.commit([("vtpm/a", b"new"), ("vtpm/b", None), ("vtpm/c", b"there")]).result()
        assert contents(store) == {"vtpm/a": b"new", "vtpm/c": b"there"}
    with opened(path) as store:
        assert contents(store) == {"vtpm/a": b"new", "vtpm/c": b"there"}


@pytest.mark.attack("A23")
def test_a_commit_for_which_there_is_no_room_changes_nothing_and_the_next_one_works(path: Path) -> None:
    run_in_child(
        lambda: _full_and_free_again(
            path, lambda: _limit_files_to(300_000), lambda: _limit_files_to(resource.RLIM_INFINITY)
        )
    )


@pytest.mark.attack("A23")
def test_of_commits_that_come_together_only_the_one_without_room_is_refused(path: Path) -> None:
    def commit() -> None:
        with opened(path) as store:
            store.commit([("vtpm/first", b"x")]).result()
            _limit_files_to(400_000)
            with held_back(path):
                small = [store.commit([(f"vtpm/{number}", b"x")]) for number in range(5)]
                large = store.commit([("vtpm/large", os.urandom(1 << 20))])
                small += [store.commit([(f"vtpm/{number}", b"x")]) for number in range(5, 10)]
            assert isinstance(large.exception(), StorageError)
            assert [future.exception() for future in small] == [None] * 10
            assert len(store.names("vtpm/")) == 11

    run_in_child(commit)


@pytest.mark.attack("A16")
def test_a_store_that_died_on_a_full_disk_has_what_it_acknowledged(path: Path) -> None:
    def fill_and_die() -> None:
        store = NvStore(path, ROOT_KEY)
        store.commit([("vtpm/a", b"acknowledged")]).result()
        _limit_files_to(300_000)
        assert isinstance(store.commit([("vtpm/a", os.urandom(1 << 20))]).exception(), StorageError)
        os._exit(7)

    with pytest.raises(Exception, match="status 7"):
        run_in_child(fill_and_die)
    with opened(path) as store:
        assert contents(store) == {"vtpm/a": b"acknowledged"}


@pytest.mark.attack("A23")
@pytest.mark.skipif(not is_root(), reason="only root can mount a small file system")
def test_a_file_system_without_room_loses_nothing(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode()}")
    ballast = tmp_path / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))

    try:
        NvStore.create(tmp_path / "nv.db", ROOT_KEY)
        _full_and_free_again(tmp_path / "nv.db", fill, ballast.unlink)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.attack("A21")
def test_whoever_stops_waiting_for_a_commit_stops_nobody_elses(path: Path) -> None:
    store = NvStore(path, ROOT_KEY)

    async def give_up() -> None:
        for number in range(50):
            waiting = asyncio.wrap_future(store.commit([("vtpm/a", number.to_bytes(2, "big"))]))
            waiting.cancel()

    asyncio.run(give_up())
    store.commit([("vtpm/b", b"state")]).result(60)
    assert store.read("vtpm/a") == (49).to_bytes(2, "big")
    store.close()
