"""A15: NV records altered, swapped, put back, removed or added from outside: an error that names the record, never a reset."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.processor.nv_store import INDEX_SHARDS, NvStore
from spvtpm.wire.errors import IntegrityError, StorageError

ROOT_KEY = b"storage root key of thirty-two b"
CONTENTS = {"vtpm/a": b"state of vTPM a", "vtpm/b": b"state of vTPM b", "vmsb/a": b"block of VM a"}

pytestmark = pytest.mark.attack("A15")


class Row(NamedTuple):
    """A record as it lies on the disk, where each column may be of any type."""

    name: Any
    version: Any
    salt: Any
    sealed: Any


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with three records; closed."""
    path = tmp_path / "nv.db"
    NvStore.create(path, ROOT_KEY)
    store = NvStore(path, ROOT_KEY)
    store.commit(list(CONTENTS.items())).result()
    store.close()
    return path


@pytest.fixture
def store(path: Path) -> Iterator[NvStore]:
    """The same store, open."""
    store = NvStore(path, ROOT_KEY)
    yield store
    store.close()


def rows(path: Path) -> dict[str, Row]:
    with closing(sqlite3.connect(path)) as database:
        return {row[0]: Row(*row) for row in database.execute("SELECT name, version, salt, sealed FROM records")}


def put_row(path: Path, row: Row) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", row)


def remove_row(path: Path, name: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM records WHERE name = ?", (name,))


def refused(path: Path) -> str:
    """The sentence with which the store refuses to open."""
    before = path.read_bytes()
    with pytest.raises(IntegrityError) as refusal:
        NvStore(path, ROOT_KEY).close()
    assert path.read_bytes() == before, "nothing is repaired, nothing is reset"
    return str(refusal.value)


def test_sqlite_alone_takes_altered_swapped_and_removed_records_for_the_truth(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "plain.db")) as plain, plain:
        plain.execute("CREATE TABLE records (name TEXT PRIMARY KEY, content BLOB)")
        plain.executemany("INSERT INTO records VALUES (?, ?)", CONTENTS.items())
    with closing(sqlite3.connect(tmp_path / "plain.db")) as attacker, attacker:
        attacker.execute("UPDATE records SET content = ? WHERE name = 'vtpm/a'", (CONTENTS["vtpm/b"],))
        attacker.execute("DELETE FROM records WHERE name = 'vmsb/a'")
    with closing(sqlite3.connect(tmp_path / "plain.db")) as plain:
        taken = dict(plain.execute("SELECT * FROM records"))
    assert taken == dict.fromkeys(("vtpm/a", "vtpm/b"), CONTENTS["vtpm/b"])


@pytest.mark.attack("A24")
def test_neither_content_nor_root_key_lies_on_the_disk(path: Path) -> None:
    store = NvStore(path, ROOT_KEY)
    store.commit([("vtpm/a", b"state of vTPM a, changed")]).result()
    on_disk = b"".join(file.read_bytes() for file in path.parent.iterdir())
    store.close()
    assert b"vtpm/a" in on_disk, "the search finds what is there"
    for secret in (ROOT_KEY, *CONTENTS.values()):
        assert secret not in on_disk


def test_the_same_content_is_never_sealed_to_the_same_bytes(path: Path, store: NvStore) -> None:
    seen = set()
    for _ in range(10):
        store.commit([("vtpm/a", b"same"), ("vtpm/b", b"same")]).result()
        seen |= {rows(path)[name].sealed for name in ("vtpm/a", "vtpm/b")}
    assert len(seen) == 20


# While the store is open


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(name=st.sampled_from(sorted(CONTENTS)), column=st.sampled_from(["salt", "sealed"]), data=st.data())
def test_any_flipped_bit_is_refused_and_only_its_record_is(
    path: Path, store: NvStore, name: str, column: str, data: st.DataObject
) -> None:
    good = rows(path)[name]
    bad = bytearray(getattr(good, column))
    bit = data.draw(st.integers(0, len(bad) * 8 - 1))
    bad[bit // 8] ^= 1 << bit % 8
    put_row(path, good._replace(**{column: bytes(bad)}))

    with pytest.raises(IntegrityError, match=name):
        store.read(name)
    for other in CONTENTS.keys() - {name}:
        assert store.read(other) == CONTENTS[other]
    put_row(path, good)
    assert store.read(name) == CONTENTS[name]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(sealed=st.binary(max_size=100) | st.integers(0, 100).map(bytes), salt=st.binary(max_size=40))
def test_bytes_that_no_secure_processor_sealed_are_refused(
    path: Path, store: NvStore, sealed: bytes, salt: bytes
) -> None:
    good = rows(path)["vtpm/a"]
    for bad in (good._replace(sealed=sealed), good._replace(salt=salt), good._replace(salt=salt, sealed=sealed)):
        put_row(path, bad)
        with pytest.raises(IntegrityError, match="vtpm/a"):
            store.read("vtpm/a")
    put_row(path, good)


@pytest.mark.parametrize("column", ["salt", "sealed"])
def test_a_column_of_another_type_is_refused(path: Path, store: NvStore, column: str) -> None:
    good = rows(path)["vtpm/a"]
    for value in ("text", 7, 1.5):
        put_row(path, good._replace(**{column: value}))
        with pytest.raises(IntegrityError, match="vtpm/a"):
            store.read("vtpm/a")


@pytest.mark.attack("A10")
def test_records_swapped_between_vtpms_are_refused(path: Path, store: NvStore) -> None:
    kept = rows(path)
    put_row(path, kept["vtpm/a"]._replace(name="vtpm/b"))
    put_row(path, kept["vtpm/b"]._replace(name="vtpm/a"))
    for name in ("vtpm/a", "vtpm/b"):
        with pytest.raises(IntegrityError, match=name):
            store.read(name)
    assert store.read("vmsb/a") == CONTENTS["vmsb/a"]


@pytest.mark.parametrize("versions_later", [1, 2, 7])
def test_a_record_put_back_to_an_older_version_is_refused(path: Path, store: NvStore, versions_later: int) -> None:
    old = rows(path)["vtpm/a"]
    for turn in range(versions_later):
        store.commit([("vtpm/a", b"newer %d" % turn)]).result()
    newest = rows(path)["vtpm/a"]

    put_row(path, old)
    with pytest.raises(IntegrityError, match=f"vtpm/a is version {old.version}, expected was {newest.version}"):
        store.read("vtpm/a")
    put_row(path, old._replace(version=newest.version))
    with pytest.raises(IntegrityError, match="vtpm/a"):
        store.read("vtpm/a")
    put_row(path, newest)
    assert store.read("vtpm/a") == b"newer %d" % (versions_later - 1)


def test_a_record_removed_from_outside_is_missed(path: Path, store: NvStore) -> None:
    remove_row(path, "vtpm/a")
    with pytest.raises(IntegrityError, match="vtpm/a is missing"):
        store.read("vtpm/a")


def test_a_record_added_from_outside_is_not_believed(path: Path, store: NvStore) -> None:
    put_row(path, rows(path)["vtpm/a"]._replace(name="vtpm/c"))
    with pytest.raises(IntegrityError, match="vtpm/c"):
        store.read("vtpm/c")
    assert store.names("vtpm/") == ["vtpm/a", "vtpm/b"]


def test_a_removed_record_that_is_put_back_is_not_believed(path: Path, store: NvStore) -> None:
    old = rows(path)["vtpm/a"]
    store.commit([("vtpm/a", None)]).result()
    put_row(path, old)
    with pytest.raises(IntegrityError, match="vtpm/a"):
        store.read("vtpm/a")


# When the store is opened


def _alter_index(path: Path) -> str:
    row = rows(path)["index/07"]
    put_row(path, row._replace(sealed=row.sealed[:-1] + bytes([row.sealed[-1] ^ 1])))
    return "index/07"


def _swap_index(path: Path) -> str:
    put_row(path, rows(path)["index/08"]._replace(name="index/07"))
    return "index/07"


def _remove_index(path: Path) -> str:
    remove_row(path, "index/63")
    return "index/63"


def _remove_record(path: Path) -> str:
    remove_row(path, "vtpm/a")
    return "vtpm/a was removed"


def _add_record(path: Path) -> str:
    put_row(path, rows(path)["vtpm/a"]._replace(name="vtpm/c"))
    return "vtpm/c was added"


def _rename_record(path: Path) -> str:
    row = rows(path)["vmsb/a"]
    remove_row(path, "vmsb/a")
    put_row(path, row._replace(name="vmsb/b"))
    return "vmsb/a was removed"


@pytest.mark.parametrize(
    "attack", [_alter_index, _swap_index, _remove_index, _remove_record, _add_record, _rename_record]
)
def test_a_store_whose_records_were_changed_does_not_open_and_names_the_record(
    path: Path, attack: Callable[[Path], str]
) -> None:
    named = attack(path)
    assert named in refused(path)


def test_every_index_record_is_missed(path: Path) -> None:
    for shard in range(INDEX_SHARDS):
        name = f"index/{shard:02}"
        row = rows(path)[name]
        remove_row(path, name)
        assert name in refused(path)
        put_row(path, row)
    NvStore(path, ROOT_KEY).close()


def test_an_altered_record_does_not_keep_the_store_from_opening_but_is_not_read(path: Path) -> None:
    put_row(path, rows(path)["vtpm/a"]._replace(sealed=os.urandom(64)))
    store = NvStore(path, ROOT_KEY)
    with pytest.raises(IntegrityError, match="vtpm/a"):
        store.read("vtpm/a")
    assert store.read("vtpm/b") == CONTENTS["vtpm/b"]
    store.close()


def test_the_store_of_another_secure_processor_does_not_open(path: Path) -> None:
    with pytest.raises(IntegrityError, match="index/root is altered, or belongs to another secure processor"):
        NvStore(path, b"another storage root key of 32 b")


def test_a_missing_store_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="missing, though this secure processor has been initialised"):
        NvStore(tmp_path / "nv.db", ROOT_KEY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"no database at all", bytes(8192), os.urandom(8000)], ids=len)
def test_a_file_that_is_no_store_does_not_open_and_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert str(path) in refused(path)


def test_an_empty_file_is_no_store(path: Path) -> None:
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(IntegrityError, match=str(path)):
            NvStore(path, ROOT_KEY)


def test_a_store_that_is_cut_off_is_refused_at_whatever_length(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(0, len(whole), 509):
        path.write_bytes(whole[:size])
        with pytest.raises(StorageError):
            store = NvStore(path, ROOT_KEY)
            try:
                for name in CONTENTS:
                    store.read(name)
            finally:
                store.close()
    path.write_bytes(whole)
    NvStore(path, ROOT_KEY).close()


def test_a_record_put_back_to_an_older_version_while_nobody_looked_is_refused_and_the_others_are_not(
    path: Path,
) -> None:
    old = rows(path)["vtpm/a"]
    store = NvStore(path, ROOT_KEY)
    store.commit([("vtpm/a", b"newer state")]).result()
    store.close()
    put_row(path, old)

    store = NvStore(path, ROOT_KEY)
    with pytest.raises(IntegrityError, match="vtpm/a is version"):
        store.read("vtpm/a")
    assert store.read("vtpm/b") == CONTENTS["vtpm/b"]
    store.close()


def test_the_index_put_back_together_with_its_record_is_refused_by_the_root(path: Path) -> None:
    before = rows(path)
    store = NvStore(path, ROOT_KEY)
    store.commit([("vtpm/a", b"newer state")]).result()
    store.close()
    changed = [name for name, row in rows(path).items() if row != before[name]]
    assert len(changed) == 3, "the record, its shard, the root"
    for name in changed:
        if name != "index/root":
            put_row(path, before[name])

    assert "it was put back or replaced" in refused(path)


def test_a_record_of_an_earlier_life_of_its_name_is_refused(path: Path) -> None:
    old = rows(path)["vtpm/a"]
    store = NvStore(path, ROOT_KEY)
    store.commit([("vtpm/a", None)]).result()
    store.commit([("vtpm/a", b"another vTPM")]).result()
    put_row(path, old)
    with pytest.raises(IntegrityError, match="vtpm/a is version"):
        store.read("vtpm/a")
    store.close()

    store = NvStore(path, ROOT_KEY)
    with pytest.raises(IntegrityError, match="vtpm/a is version"):
        store.read("vtpm/a")
    store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER swallow BEFORE INSERT ON records BEGIN SELECT RAISE(IGNORE); END",
        "CREATE TABLE more (x)",
        "CREATE VIEW records_too AS SELECT * FROM records",
        "CREATE INDEX by_version ON records (version)",
    ],
)
def test_a_schema_with_more_than_our_table_is_refused(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)

    assert "its schema is not the one" in refused(path)


def test_a_trigger_planted_under_an_open_store_loses_no_acknowledged_write(path: Path) -> None:
    store = NvStore(path, ROOT_KEY)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TRIGGER swallow BEFORE INSERT ON records BEGIN SELECT RAISE(IGNORE); END")
    with pytest.raises(StorageError):
        store.commit([("vtpm/a", b"newer state")]).result()
    store.close()
