"""Targets for files that somebody else may have written: the fuses' counter, configuration, and the NV store's database."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path

import msgspec

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.processor.config import DEFAULT_TOML, SpConfig, load_config
from spvtpm.processor.fuses.file import FileCounter
from spvtpm.processor.nv_store import NvStore
from spvtpm.wire.errors import FusesError, IntegrityError, StorageError

_ROOT_KEY = b"storage root key of thirty-two b"
_RECORDS = {"vtpm/a": b"state of vTPM a", "vtpm/b": b"state of vTPM b" * 400, "vmsb/a": b"block of VM a"}
_FOREIGN = "vtpm/foreign"


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in memory, if there is one."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder made in it is this process's own
    with tempfile.TemporaryDirectory(prefix="spvtpm-fuzz-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def fuzz_counter(data: bytes) -> None:
    """The fuses' counter: a number that grows by one, or an error that leaves the file as it was."""
    with _scratch() as folder:
        path = folder / "counter"
        _write_private(path, data)
        counter = FileCounter(path)
        try:
            number = counter.read()
            assert counter.increment() == number + 1, "a step is one"
        except FusesError:
            assert path.read_bytes() == data, "what is no number stays as it is"
            return
        assert counter.read() == number + 1, "a step is kept"


def fuzz_config(data: bytes) -> None:
    """`sp.toml`: what is loaded is within the bounds that its fields name."""
    with _scratch() as folder:
        path = folder / "sp.toml"
        path.write_bytes(data)
        try:
            config = load_config(path)
        except StorageError:
            return
    assert 1 <= config.max_vms <= 100_000 and 0 <= config.spare_workers <= 64, "numbers are within their bounds"
    assert 0.05 <= config.park_after_s <= 86_400, "a time is within its bounds"
    assert len(config.allowed_uids) <= 64 and all(0 <= uid < 1 << 32 for uid in config.allowed_uids), "users are users"
    assert msgspec.json.decode(msgspec.json.encode(config), type=SpConfig) == config, "a configuration has one meaning"


@cache
def _good_store() -> bytes:
    with _scratch() as folder:
        path = folder / "nv.db"
        NvStore.create(path, _ROOT_KEY)
        store = NvStore(path, _ROOT_KEY)
        store.commit(list(_RECORDS.items())).result()
        store.close()
        return path.read_bytes()


def _value(program: Program) -> object:
    """Something that SQLite can hold in any column, whatever the column says."""
    kind = program.below(6)
    if kind == 0:
        return program.choose((0, 1, 2, -1, (1 << 63) - 1, -(1 << 63)))
    if kind == 1:
        return program.choose((0.5, float("inf"), 1e300, -0.0))
    if kind == 2:
        return program.take(program.below(40))
    if kind == 3:
        return program.choose((*_RECORDS, "index/00", "index/64", _FOREIGN, "", "\0", "ü", "1"))
    return None if kind == 4 else bytes(program.choose((0, 7, 8, 12, 16, 28, 128)))


def _tamper(program: Program, database: sqlite3.Connection) -> None:
    """One change from outside."""
    columns = ("name", "version", "salt", "sealed")
    names = [row[0] for row in database.execute("SELECT name FROM records")]
    victim, other = program.choose(names), program.choose(names)
    kind = program.below(9)
    if kind <= 2:
        sql = f"UPDATE OR REPLACE records SET {program.choose(columns)} = ? WHERE name IS ?"  # noqa: S608
        database.execute(sql, (_value(program), victim))
    elif kind == 3:
        database.execute("DELETE FROM records WHERE name IS ?", (victim,))
    elif kind == 4:
        row = (_value(program), _value(program), _value(program), _value(program))
        database.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", row)
    elif kind == 5:
        copied = "SELECT version, salt, sealed FROM records WHERE name IS ?"
        database.execute(f"UPDATE records SET (version, salt, sealed) = ({copied}) WHERE name IS ?", (other, victim))  # noqa: S608
    elif kind == 6:
        row_of = "SELECT sealed FROM records WHERE name IS ?"
        for (sealed,) in database.execute(row_of, (victim,)).fetchall():
            if isinstance(sealed, bytes):
                database.execute("UPDATE records SET sealed = ? WHERE name IS ?", (program.damage(sealed), victim))
    elif kind == 7:
        database.execute("ALTER TABLE records RENAME TO moved")
        selected = program.choose(("*", "name, version, salt, 1 AS sealed", "name, NULL AS version, salt, sealed"))
        database.execute(f"CREATE VIEW records AS SELECT {selected} FROM moved")  # noqa: S608
    else:
        database.execute("ALTER TABLE records RENAME TO moved")
        database.execute("CREATE TABLE records (name, version, salt, sealed)")  # holds anything, and names twice
        for _ in range(1 + program.below(2)):
            database.execute("INSERT INTO records SELECT * FROM moved")


def fuzz_nv_store(data: bytes) -> None:
    """A tampered database: the records as they were committed, or an error that says so."""
    program = Program(data)
    with _scratch() as folder:
        path = folder / "nv.db"
        if program.below(3) == 0:
            path.write_bytes(_overwritten(program, _good_store()))
            if program.below(4) == 0:
                path.with_name("nv.db-wal").write_bytes(program.rest())
        else:
            path.write_bytes(_good_store())
            with closing(sqlite3.connect(path)) as database, suppress(sqlite3.Error, OverflowError), database:
                for _ in range(1 + program.below(3)):
                    _tamper(program, database)
        _read_all(path)


def _overwritten(program: Program, content: bytes) -> bytes:
    """The file with pieces overwritten, its first page (header and schema) more often than the others."""
    changed = bytearray(content)
    for _ in range(1 + program.below(4)):
        at = program.below(program.choose((100, 1024, len(changed))))
        piece = program.take(1 + program.below(8))
        changed[at : at + len(piece)] = piece
    return bytes(changed if program.below(4) else changed[: program.below(len(changed))])


def _read_all(path: Path) -> None:
    """Opens the store and reads it, as the SP does after a start."""
    try:
        store = NvStore(path, _ROOT_KEY)
    except (IntegrityError, StorageError):
        return
    try:
        names = [name for name in store.names("") if not name.startswith("index/")]
        assert names == sorted(_RECORDS), "no record comes or goes"
        for name, content in _RECORDS.items():
            with suppress(IntegrityError, StorageError):
                assert store.read(name) == content, "a record is what was committed, or an error"
    finally:
        store.close()


def _seeds_counter() -> Sequence[bytes]:
    return (b"0", b"41", b"-1", b"1_0", b" 7", b"9" * 19, b"9" * 20, b"9" * 21, "٣".encode())


def _seeds_config() -> Sequence[bytes]:
    return (
        DEFAULT_TOML.encode(),
        b"allowed_uids = [0, 1000]\nmax_vms = 16\npark_after_s = 0.5\nspare_workers = 0\n",
        b"park_after_s = 1e400\n",
        b"park_after_s = inf\n",
        b'[table]\nkey = """text"""\nat = 1979-05-27T07:32:00Z\n',
        b"max_vms = 0x10\nallowed_uids = [\n  1, # one\n]\n",
    )


def _seeds_nv_store() -> Sequence[bytes]:
    return [bytes([1, 0, kind, 1, 2, 3, *range(10)]) for kind in range(9)] + [b"\0\0\0\0\0\1\0\0"]


_CONFIG_WORDS = (
    *(b"allowed_uids", b"max_vms", b"park_after_s", b"spare_workers", b" = ", b"nan", b"inf", b"true", b"[[", b"]]"),
    *(b'"""', b"'''", b"0x", b"1e9", b"-1", b"\\u0000", b"\\UDC80", b"1979-05-27", b"{", b"}", b"\r\n", b"_"),
)

STORAGE_TARGETS = (
    Target("counter", "the fuses' counter", fuzz_counter, _seeds_counter, (b"0", b"9" * 19), longest=32),
    Target("config", "the configuration file sp.toml", fuzz_config, _seeds_config, _CONFIG_WORDS, longest=6000),
    Target("nv_store", "a tampered NV database", fuzz_nv_store, _seeds_nv_store, examples=250, longest=512),
)
