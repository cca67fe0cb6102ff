"""A directory that stands for fuses: a chip moved in once, private, never believed when damaged; a counter that only grows."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.processor.fuses import Fuses
from spvtpm.processor.fuses.file import FileCounter, counter_at
from spvtpm.processor.fuses.keepers import HostTpm, Keeper, Pkcs11Token, burn_fuses, load_fuses
from spvtpm.wire.errors import AlreadyInitialised, ChipFileError, FusesError
from tests.harness import is_root
from tests.papers import put_chip_file
from tests.throwaway import run_in_child

FILES = pytest.mark.parametrize("name", ["chip", "counter"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where fuses lie."""
    return tmp_path / "fuses"


@pytest.fixture
def chip_file(tmp_path: Path) -> Path:
    """A chip that was just manufactured."""
    put_chip_file(tmp_path / "chip-1")
    return tmp_path / "chip-1"


@pytest.fixture
def burnt(directory: Path, chip_file: Path) -> Fuses:
    """Fuses with a chip in them."""
    return burn_fuses(directory, chip_file)


def public_and_secret(fuses: Fuses) -> tuple[object, ...]:
    """All of it but the counter, to compare."""
    key = fuses.endorsement.key.private_numbers()
    return fuses.chip_id, fuses.storage_root_key, fuses.sp_secret, key, fuses.certificates


def secrets_of(fuses: Fuses) -> list[bytes]:
    key = fuses.endorsement.key.private_numbers().private_value.to_bytes(48, "big")
    return [fuses.storage_root_key, fuses.sp_secret.value, key]


# The chip


def test_the_chip_that_was_burnt_is_loaded(directory: Path, chip_file: Path) -> None:
    chip = put_chip_file(chip_file.with_name("chip-2"))
    burnt = burn_fuses(directory, chip_file.with_name("chip-2"))
    assert (burnt.chip_id, burnt.storage_root_key, burnt.certificates) == (
        chip.chip_id,
        chip.storage_root_key,
        chip.certificates,
    )
    assert (burnt.sp_secret.fleet_id, burnt.sp_secret.value) == (chip.fleet_id, chip.sp_secret)
    assert burnt.endorsement.certificate == chip.chain().chip_certificate
    assert public_and_secret(load_fuses(directory)) == public_and_secret(burnt)


def test_the_fuses_are_private(directory: Path, burnt: Fuses) -> None:
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == {"chip": 0o600, "counter": 0o600}


def test_a_chip_is_moved_so_that_it_cannot_be_burnt_twice(directory: Path, chip_file: Path, burnt: Fuses) -> None:
    assert not chip_file.exists()
    with pytest.raises(ChipFileError, match="chip-1"):
        burn_fuses(directory.with_name("other"), chip_file)
    assert not directory.with_name("other").exists()


def test_fuses_are_burnt_once(directory: Path, chip_file: Path, burnt: Fuses) -> None:
    load_fuses(directory).counter.increment()
    put_chip_file(chip_file)
    with pytest.raises(AlreadyInitialised):
        burn_fuses(directory, chip_file)
    assert chip_file.exists()
    assert public_and_secret(load_fuses(directory)) == public_and_secret(burnt)
    assert load_fuses(directory).counter.read() == 1


def test_fuses_that_cannot_be_written_are_named_and_the_chip_stays_where_it_was(
    tmp_path: Path, chip_file: Path
) -> None:
    with pytest.raises(FusesError, match="nowhere"):
        burn_fuses(tmp_path / "nowhere" / "fuses", chip_file)
    assert chip_file.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 4000, b"x" * 20_000])
def test_what_is_no_chip_file_is_not_burnt(directory: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "no-chip"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(ChipFileError):
        burn_fuses(directory, path)
    assert not directory.exists()
    assert path.read_bytes() == content


@pytest.mark.attack("A15")
def test_every_flipped_bit_of_the_chip_gives_the_same_chip_or_none(directory: Path, burnt: Fuses) -> None:
    path = directory / "chip"
    good = path.read_bytes()
    for bit in range(0, len(good) * 8, 7):  # every byte, and each bit of it in turn
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(bad))
        try:
            assert public_and_secret(load_fuses(directory)) == public_and_secret(burnt), f"bit {bit}"
        except FusesError:
            continue


# Both files


@FILES
def test_a_missing_file_is_named_and_not_made_anew(directory: Path, burnt: Fuses, name: str) -> None:
    (directory / name).unlink()
    for _ in range(2):
        with pytest.raises(FusesError, match=str(directory / name)):
            load_fuses(directory)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"[" * 4000, b'{"format":2}', b"\xff\xfe{}", b"-1", b"x" * 20_000]
)
@FILES
def test_something_else_in_a_files_place_is_refused(directory: Path, burnt: Fuses, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(FusesError, match=str(directory)):
        load_fuses(directory)


@pytest.mark.attack("A24")
@FILES
def test_files_that_others_can_read_or_write_are_refused(directory: Path, burnt: Fuses, name: str) -> None:
    for mode in (0o640, 0o604, 0o620, 0o601):
        (directory / name).chmod(mode)
        with pytest.raises(FusesError, match="can be read by others"):
            load_fuses(directory)


@FILES
def test_a_link_in_a_files_place_is_refused(directory: Path, burnt: Fuses, name: str) -> None:
    (directory / name).rename(directory / "elsewhere")
    (directory / name).symlink_to(directory / "elsewhere")
    with pytest.raises(FusesError, match=name):
        load_fuses(directory)


@pytest.mark.attack("A27")
@pytest.mark.skipif(not is_root(), reason="only root can give a file away")
@FILES
def test_files_of_another_user_are_refused(directory: Path, burnt: Fuses, name: str) -> None:
    os.chown(directory / name, 65533, 65533)
    with pytest.raises(FusesError, match="65533"):
        load_fuses(directory)


@pytest.mark.parametrize(
    ("keeper", "library", "extra"),
    [
        (HostTpm("device"), "tpm2_pytss", "spvtpm[host-tpm]"),
        (Pkcs11Token("/none.so", "chips", "/none.pin"), "pkcs11", "spvtpm[pkcs11]"),
    ],
)
def test_hardware_without_its_library_names_what_to_install(
    directory: Path, chip_file: Path, monkeypatch: pytest.MonkeyPatch, keeper: Keeper, library: str, extra: str
) -> None:
    for module in ("host_tpm", "sealed_to_tpm", "pkcs11_token", "sealed_to_token"):
        monkeypatch.delitem(sys.modules, f"spvtpm.processor.fuses.{module}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(FusesError, match=re.escape(f"{library} is not installed: pip install '{extra}'")):
        burn_fuses(directory, chip_file, keeper)
    assert chip_file.exists()


# The counter


def test_the_counter_of_a_new_chip_is_0_and_only_grows_and_is_kept(directory: Path, burnt: Fuses) -> None:
    assert burnt.counter.read() == 0
    for number in range(1, 12):
        assert load_fuses(directory).counter.increment() == number
        assert burnt.counter.read() == load_fuses(directory).counter.read() == number


@given(number=st.integers(0, 10**18))
def test_a_counter_goes_on_from_every_number(tmp_path_factory: pytest.TempPathFactory, number: int) -> None:
    path = tmp_path_factory.mktemp("fuses") / "counter"
    path.touch(mode=0o600)
    path.write_bytes(counter_at(number))
    assert FileCounter(path).increment() == number + 1
    assert FileCounter(path).read() == number + 1


@pytest.mark.attack("A23")
def test_a_counter_that_cannot_be_written_says_so_and_stays(directory: Path, burnt: Fuses) -> None:
    def fill_the_disk() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with pytest.raises(FusesError, match="counter"):
            burnt.counter.increment()

    burnt.counter.increment()
    run_in_child(fill_the_disk)
    assert load_fuses(directory).counter.read() == 1


@pytest.mark.attack("A15")
def test_a_flipped_bit_of_the_counter_gives_a_number_or_an_error(directory: Path, burnt: Fuses) -> None:
    path = directory / "counter"
    burnt.counter.increment()
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 7):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        assert load_fuses(directory).counter.read() in (0, 1)  # the slot that is whole
    for cut in (0, 511, 1023):
        path.write_bytes(content[:cut])
        with pytest.raises(FusesError, match=str(path)):
            load_fuses(directory).counter.read()


@pytest.mark.attack("A16")
def test_a_step_that_the_power_cut_short_was_taken_or_not(directory: Path, burnt: Fuses) -> None:
    path = directory / "counter"
    for number in range(5):
        before = path.read_bytes()
        burnt.counter.increment()
        after = path.read_bytes()
        for written in range(0, len(after), 8):
            path.write_bytes(after[:written] + before[written:])
            assert load_fuses(directory).counter.read() in (number, number + 1)
        path.write_bytes(after)


# Secrets


@pytest.mark.attack("A24")
def test_neither_a_representation_nor_an_error_shows_a_secret(directory: Path, burnt: Fuses) -> None:
    shown = f"{burnt!r} {burnt.endorsement!r} {burnt.sp_secret!r} {burnt.counter!r}"
    assert repr(burnt) == str(burnt) == f"Fuses(chip_id={burnt.chip_id.hex()})"
    path = directory / "chip"
    good = path.read_bytes()
    damage: list[Callable[[bytes], bytes]] = [
        lambda content: content[:-10],
        lambda content: content.replace(b'"generation":1', b'"generation":"TOP-SECRET"'),
        lambda content: content + b"TOP-SECRET",
    ]
    for change in damage:
        path.write_bytes(change(good))
        try:
            load_fuses(directory)
        except FusesError:
            shown += traceback.format_exc()
        else:
            pytest.fail("damaged fuses were loaded")
    assert "TOP-SECRET" not in shown
    for secret in secrets_of(burnt):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
