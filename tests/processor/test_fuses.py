"""The fuses file: burnt once, private, and never believed when a byte of it is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.processor.fuses import Fuses, burn_fuses, load_fuses, new_fuses
from spvtpm.wire.errors import AlreadyInitialised, FusesError
from tests.harness import is_root


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where fuses lie."""
    return tmp_path / "fuses"


def create_fuses(path: Path) -> Fuses:
    """A new chip."""
    fuses = new_fuses()
    burn_fuses(path, fuses)
    return fuses


def with_checksum(fuses: str) -> str:
    """A file whose checksum is right, whatever it holds."""
    return f'{{"format":1,"fuses":{fuses},"sha256":"{hashlib.sha256(fuses.encode()).hexdigest()}"}}'


def put(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def test_what_was_burnt_is_loaded(path: Path) -> None:
    burnt = create_fuses(path)
    assert load_fuses(path) == burnt
    assert (len(burnt.chip_id), len(burnt.storage_root_key)) == (16, 32)
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_two_chips_are_alike(tmp_path: Path) -> None:
    chips = [create_fuses(tmp_path / str(number)) for number in range(20)]
    assert len({chip.chip_id for chip in chips}) == len({chip.storage_root_key for chip in chips}) == 20


def test_fuses_are_burnt_once(path: Path) -> None:
    burnt = create_fuses(path)
    with pytest.raises(AlreadyInitialised):
        create_fuses(path)
    assert load_fuses(path) == burnt


def test_fuses_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(FusesError, match="nowhere"):
        create_fuses(tmp_path / "nowhere" / "fuses")


@pytest.mark.attack("A15")
def test_every_flipped_bit_is_refused(path: Path) -> None:
    burnt = create_fuses(path)
    good = path.read_bytes()
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        put(path, bytes(bad))
        try:
            assert load_fuses(path) == burnt, f"bit {bit}"
        except FusesError:
            continue


@pytest.mark.attack("A15")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), how=st.sampled_from(["set", "insert", "cut"]))
def test_a_byte_set_or_added_and_a_file_cut_off_give_the_same_fuses_or_none(
    path: Path, place: float, byte: int, how: str
) -> None:
    if not path.exists():
        create_fuses(path)
        path.with_name("good").write_bytes(path.read_bytes())
    good = path.with_name("good").read_bytes()
    put(path, good)
    burnt = load_fuses(path)
    at = int(place * len(good))
    tail = {"set": good[at + 1 :], "insert": good[at:], "cut": b""}[how]
    put(path, good[:at] + bytes([byte]) + tail)
    try:
        assert load_fuses(path) == burnt
    except FusesError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "fuses",
    [
        "{}",
        "null",
        "[]",
        '{"chip_id":"AAAA","storage_root_key":"AAAA"}',
        json.dumps({"chip_id": "A" * 21 + "A==", "storage_root_key": "A" * 43 + "=", "more": 1}),
        json.dumps({"chip_id": "A" * 21 + "A==", "storage_root_key": "A" * 42 + "=="}),
    ],
)
def test_a_right_checksum_over_wrong_fuses_is_not_enough(path: Path, fuses: str) -> None:
    put(path, with_checksum(fuses).encode())
    with pytest.raises(FusesError, match="damaged"):
        load_fuses(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[" * 4000, b'{"format":1}', b"\xff\xfe{}", b"x" * 5000])
def test_something_else_than_a_fuses_file_is_refused(path: Path, content: bytes) -> None:
    put(path, content)
    with pytest.raises(FusesError, match=str(path)):
        load_fuses(path)


def test_another_format_is_refused(path: Path) -> None:
    create_fuses(path)
    put(path, path.read_bytes().replace(b'"format":1', b'"format":2'))
    with pytest.raises(FusesError):
        load_fuses(path)


def test_missing_fuses_are_named(path: Path) -> None:
    with pytest.raises(FusesError, match=str(path)):
        load_fuses(path)


@pytest.mark.attack("A24")
def test_fuses_that_others_can_read_are_refused(path: Path) -> None:
    create_fuses(path)
    for mode in (0o640, 0o604, 0o620, 0o601):
        path.chmod(mode)
        with pytest.raises(FusesError, match="can be read by others"):
            load_fuses(path)


def test_a_link_to_fuses_is_refused(path: Path) -> None:
    create_fuses(path)
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(FusesError):
        load_fuses(link)


@pytest.mark.attack("A27")
@pytest.mark.skipif(not is_root(), reason="only root can give a file away")
def test_fuses_of_another_user_are_refused(path: Path) -> None:
    create_fuses(path)
    os.chown(path, 65533, 65533)
    with pytest.raises(FusesError, match="65533"):
        load_fuses(path)


@pytest.mark.attack("A24")
def test_neither_the_representation_nor_an_error_shows_the_root_key(path: Path) -> None:
    fuses = Fuses(b"c" * 16, b"SECRET-ROOT-KEY-OF-32-BYTES-LONG")
    assert repr(fuses) == str(fuses) == f"Fuses(chip_id={(b'c' * 16).hex()})"

    put(path, with_checksum('{"chip_id":"TOP-SECRET"}').encode())
    try:
        load_fuses(path)
    except FusesError:
        assert "TOP-SECRET" not in traceback.format_exc()
    else:
        pytest.fail("damaged fuses were loaded")
