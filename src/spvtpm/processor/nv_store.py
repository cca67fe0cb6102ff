"""Non-volatile storage of the SP: sealed records in SQLite, durable before `commit` returns.

Every record is sealed with AES-256-GCM under a key derived from the storage root key; its name and version are associated
data, so a record cannot stand in for another one. Which records exist, and in which version, is itself sealed (the index:
shards, and a root that knows the versions of the shards), so none can be removed, added or put back to an older version
unseen. A version is the number of the transaction that wrote the record, so none is ever used twice under one name. All
changes that wait when a commit begins go into one transaction: one sync for many vTPMs.

A whole store put back to an older copy of itself is not noticed here, but by `rollback_guard.py`.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sqlite3
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.files import sync_directory
from spvtpm.wire.errors import AlreadyInitialised, IntegrityError, StorageError

INDEX_SHARDS = 64
"""The index is spread over this many records, so that a commit re-seals little."""

_INDEX = "index/"
_ROOT = "index/root"
_SHARDS = tuple(f"{_INDEX}{number:02}" for number in range(INDEX_SHARDS))

_SCHEMA = """\
CREATE TABLE records (
    name TEXT PRIMARY KEY NOT NULL,
    version INTEGER NOT NULL,
    salt BLOB NOT NULL,
    sealed BLOB NOT NULL
) WITHOUT ROWID"""
_SALT_BYTES = 16
_NONCE_BYTES = 12
_VERSION = struct.Struct(">Q")
_PAGE_BYTES = 1024
"""A commit writes whole pages, of a record, its index shard and the root: small ones are on the disk in half the time."""

_CHECKPOINT_PAGES = 1024
"""The write-ahead log is folded into the database when it has this many pages."""

_LOG_BYTES = (_CHECKPOINT_PAGES + 256) * (_PAGE_BYTES + 24) + 32
"""Length of the log with all these pages and some to spare. Source: SQLite, "WAL-mode File Format"."""

_QUICK_S = 0.002
_MEMORY = 8
"""How long a commit takes on a disk for which it is not worth while to wake a thread; and over how many that is averaged."""

_CACHE_KIB = 256
"""SQLite's page cache: records are written often and read once a boot, so there is little to gain from more."""

Change = tuple[str, bytes | None]
"""A record's name and its new content; None removes it."""


def _shard_of(name: str) -> str:
    return _SHARDS[hashlib.sha256(name.encode()).digest()[0] % INDEX_SHARDS]


class _Sealer:
    """Seals and opens records. Each sealing has a key of its own, so random nonces never come near their bound."""

    def __init__(self, root_key: bytes) -> None:
        self._root_key = root_key

    def _cipher(self, name: str, salt: bytes) -> AESGCM:
        return AESGCM(HKDF(SHA256(), 32, salt, b"spvtpm nv record v1/" + name.encode()).derive(self._root_key))

    @staticmethod
    def _associated(name: str, version: int) -> bytes:
        return _VERSION.pack(version) + name.encode()

    def seal(self, name: str, version: int, content: bytes) -> tuple[bytes, bytes]:
        """Salt and sealed bytes."""
        salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
        return salt, nonce + self._cipher(name, salt).encrypt(nonce, content, self._associated(name, version))

    def open(self, name: str, version: int, salt: bytes, sealed: bytes) -> bytes:
        """The content.

        Raises:
            IntegrityError: altered, another record's, or of another SP.
        """
        try:
            cipher = self._cipher(name, salt)
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self._associated(name, version))
        except (InvalidTag, ValueError, OverflowError):
            raise IntegrityError(f"NV record {name} is altered, or belongs to another secure processor") from None


def _cannot_take(error: Exception) -> StorageError:
    return StorageError(f"the NV store cannot take the change: {error}")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA busy_timeout=5000")
        connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
    except BaseException:
        connection.close()
        raise
    return connection


def _verify_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Nothing but our own table: no trigger that swallows writes, no view in its place.

    Raises:
        IntegrityError: there is something else.
    """
    found = connection.execute("SELECT type, name, sql FROM sqlite_schema").fetchall()
    if found != [("table", "records", _SCHEMA)]:
        raise IntegrityError(f"the NV store {path} is damaged: its schema is not the one that it was made with")


def _checked(rows: Iterable[tuple[object, object]]) -> dict[str, int]:
    """Names and versions; in a file changed from outside they may be of any type.

    Raises:
        IntegrityError: they are.
    """
    versions = {}
    for name, version in rows:
        if not isinstance(name, str) or not isinstance(version, int) or not 0 < version < 1 << 63:
            raise IntegrityError(f"the NV store has a row that it never wrote: {str(name)[:64]!r}")
        versions[name] = version
    return versions


class NvStore:
    """The sealed records of one SP. One process at a time; the caller holds the state directory's lock.

    Args:
        path: the database file, made by `create`.
        root_key: 32 bytes, the storage root key.

    Raises:
        IntegrityError: the file is missing or damaged, a record was removed, added or put back, or the root key is another.
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: Path, root_key: bytes) -> None:
        self._sealer = _Sealer(root_key)
        if not path.is_file():
            raise IntegrityError(f"the NV store {path} is missing, though this secure processor has been initialised")
        with ExitStack() as undo:
            try:
                self._reader = undo.enter_context(closing(_connect(path)))
                self._writer = undo.enter_context(closing(_connect(path)))
                _verify_schema(self._reader, path)
                self._versions = _checked(self._reader.execute("SELECT name, version FROM records"))
                self._reader.execute("PRAGMA journal_mode=WAL")
            except sqlite3.DatabaseError as error:
                raise IntegrityError(f"the NV store {path} is damaged: {error}") from None
            self._index = self._check_index()
            self._lengthen_log(path)
            undo.pop_all()
        self._queue: queue.SimpleQueue[tuple[Sequence[Change], Future[None]] | None] = queue.SimpleQueue()
        self._last = Future[None]()  # of what was handed in last
        self._last.set_result(None)
        self._turn = threading.Lock()
        self._typical_s = 2 * _QUICK_S
        self._thread = threading.Thread(target=self._write, name="nv-writer")
        self._thread.start()

    @classmethod
    def create(cls, path: Path, root_key: bytes) -> None:
        """Makes an empty store, for fuses that are burnt after it.

        Raises:
            AlreadyInitialised: there is one, whose fuses were lost or never burnt; it is not replaced.
            StorageError: it cannot be written.
        """
        if path.exists():
            raise AlreadyInitialised(f"the NV store {path} exists already, but its fuses do not")
        sealer = _Sealer(root_key)
        temporary = path.with_suffix(".new")
        try:
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            with closing(_connect(temporary)) as connection:
                connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
                connection.execute(_SCHEMA)
                index = {name: msgspec.msgpack.encode({}) for name in _SHARDS}
                index[_ROOT] = msgspec.msgpack.encode([1] * INDEX_SHARDS)
                connection.execute("BEGIN")
                for name, content in index.items():
                    connection.execute(
                        "INSERT INTO records VALUES (?, 1, ?, ?)", (name, *sealer.seal(name, 1, content))
                    )
                connection.execute("COMMIT")
            temporary.rename(path)
            sync_directory(path.parent)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"cannot make the NV store {path}: {error}") from None

    def _lengthen_log(self, path: Path) -> None:
        """Gives the log its full length at once: a commit that makes a file longer takes nearly twice as long to be durable.

        SQLite ends reading a log at the first bytes that are no frame of it.
        """
        with suppress(sqlite3.Error, OSError):  # without room, the log grows by itself as far as it can
            self._writer.execute("PRAGMA user_version=1")  # from here on there is a log
            with path.with_name(f"{path.name}-wal").open("r+b") as log:
                log.write(bytes(max(0, _LOG_BYTES - log.seek(0, os.SEEK_END))))
                log.flush()
                os.fsync(log.fileno())

    def _check_index(self) -> dict[str, dict[str, int]]:
        """Reads the index. A record in another version than it says is refused when it is read, alone."""
        root = msgspec.msgpack.decode(self.read(_ROOT), type=list[int])
        self._believe(dict(zip(_SHARDS, root, strict=True)), set(_SHARDS))
        index = {shard: self._read_index(shard) for shard in _SHARDS}
        known = {name: version for names in index.values() for name, version in names.items()}
        self._believe(known, {name for name in self._versions if not name.startswith(_INDEX)})
        return index

    def _read_index(self, name: str) -> dict[str, int]:
        return msgspec.msgpack.decode(self.read(name), type=dict[str, int])

    def _believe(self, known: dict[str, int], present: set[str]) -> None:
        for name in sorted(known.keys() - present):
            raise IntegrityError(f"NV record {name} was removed from the store")
        for name in sorted(present - known.keys()):
            raise IntegrityError(f"NV record {name} was added to the store from outside")
        self._versions |= known

    def __contains__(self, name: str) -> bool:
        return name in self._versions

    @property
    def transactions(self) -> int:
        """How many there have been: it grows whenever something is written."""
        return self._versions[_ROOT]

    def version(self, name: str) -> int:
        """The number of the transaction that wrote the record last; 0 if there is no such record."""
        return self._versions.get(name, 0)

    def names(self, prefix: str) -> list[str]:
        """The names of all records that begin with `prefix`, sorted."""
        return sorted(name for name in list(self._versions) if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        """A record's content as last committed. For one thread, and not while a change of this record is under way.

        Raises:
            IntegrityError: it is missing, altered, or older than what this process has committed.
            StorageError: the file cannot be read.
        """
        try:
            row = self._reader.execute("SELECT version, salt, sealed FROM records WHERE name = ?", (name,)).fetchone()
        except sqlite3.DatabaseError as error:
            raise StorageError(f"cannot read NV record {name}: {error}") from None
        if row is None:
            raise IntegrityError(f"NV record {name} is missing")
        version, salt, sealed = row
        if version != (expected := self._versions.get(name)):
            raise IntegrityError(
                f"NV record {name} is version {version}, expected was {expected}: it was put back or replaced"
            )
        if not isinstance(salt, bytes) or not isinstance(sealed, bytes):
            raise IntegrityError(f"NV record {name} is altered")
        return self._sealer.open(name, version, salt, sealed)

    def commit(self, changes: Sequence[Change]) -> Future[None]:
        """Makes the changes durable, all or none; the future is done once they are.

        The future raises `StorageError` when they are not; the store is then as it was.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # whoever stops waiting for it does not stop it
        self._last = future
        self._queue.put((changes, future))
        return future

    def commit_at_once(self, changes: Sequence[Change]) -> bool:
        """Makes the changes durable before it returns, if no other commit is under way and the disk has been quick.

        Returns:
            Whether it did; if not, nothing was done: `commit` them.

        Raises:
            StorageError: it could not; the store is as it was.
        """
        # Not the queue: what the writer has taken out of it is not written yet, and must not be overtaken.
        if self._typical_s > _QUICK_S or not self._last.done() or not self._turn.acquire(blocking=False):
            return False
        try:
            self._transact(changes)
        except Exception as error:
            raise _cannot_take(error) from None
        finally:
            self._turn.release()
        return True

    def close(self) -> None:
        """Waits for what was handed in, then closes the files."""
        self._queue.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _write(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            is_last = False
            with suppress(queue.Empty):
                while not is_last:
                    item = self._queue.get_nowait()
                    if item is None:
                        is_last = True
                    else:
                        batch.append(item)
            self._write_batch(batch)
            if is_last:
                return

    def _write_batch(self, batch: list[tuple[Sequence[Change], Future[None]]]) -> None:
        try:
            with self._turn:
                self._transact([change for changes, _future in batch for change in changes])
        except Exception as error:  # whatever it is: the thread that everyone waits for goes on
            if len(batch) > 1:
                # One of them may be what does not fit: each gets its own chance.
                for item in batch:
                    self._write_batch([item])
            else:
                batch[0][1].set_exception(_cannot_take(error))
            return
        for _changes, future in batch:
            future.set_result(None)

    def _transact(self, changes: Sequence[Change]) -> None:
        begin = time.monotonic()
        self._write_changes(changes)
        self._typical_s += (time.monotonic() - begin - self._typical_s) / _MEMORY

    def _write_changes(self, changes: Sequence[Change]) -> None:
        versions = dict[str, int | None]()
        index = dict[str, dict[str, int]]()
        number = self._versions[_ROOT] + 1
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            for name, content in changes:
                versions[name] = self._put(name, number, content)
                shard = index.setdefault(_shard_of(name), dict(self._index[_shard_of(name)]))
                shard.pop(name, None)
                if content is not None:
                    shard[name] = number
            versions |= self._put_index(index, number)
            self._writer.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            raise
        self._index.update(index)
        for name, version in versions.items():
            if version is None:
                self._versions.pop(name, None)
            else:
                self._versions[name] = version

    def _put_index(self, index: dict[str, dict[str, int]], number: int) -> dict[str, int | None]:
        root = [number if shard in index else self._versions[shard] for shard in _SHARDS]
        parts: dict[str, dict[str, int] | list[int]] = {**index, _ROOT: root}
        return {name: self._put(name, number, msgspec.msgpack.encode(part)) for name, part in parts.items()}

    def _put(self, name: str, version: int, content: bytes | None) -> int | None:
        if content is None:
            self._writer.execute("DELETE FROM records WHERE name = ?", (name,))
            return None
        row = (name, version, *self._sealer.seal(name, version, content))
        if self._writer.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", row).rowcount != 1:
            raise sqlite3.DatabaseError("the table does not take the record")
        return version
