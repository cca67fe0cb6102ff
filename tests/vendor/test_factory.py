"""The vendor's directory and the chips that come out of it: whole or not at all, private, and verifiable by a stranger."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from spvtpm.processor.sp_secret import SpSecret
from spvtpm.vendor import authority
from spvtpm.vendor.authority import (
    init_vendor,
    load_vendor,
    raise_generation,
    read_revocation_list,
    refresh_revocation_list,
    revoke_chip,
)
from spvtpm.vendor.factory import ALL_FEATURES, manufacture_chip
from spvtpm.vendor.fleet import Fleet, encode_fleet, parse_fleet
from spvtpm.wire.certificate_extensions import Features
from spvtpm.wire.certificate_policies import Purpose, genuine
from spvtpm.wire.chip_file import Chip, parse_chip_file
from spvtpm.wire.errors import (
    AlreadyExists,
    CertificateExpired,
    CertificateRevoked,
    ChipUnknown,
    GenerationError,
    RevocationUnknown,
    StorageError,
    UsageError,
    VendorError,
)
from spvtpm.wire.generations import MAX_GENERATION
from tests.harness import is_root
from tests.papers import DAY, NOW

PRIVATE = {"root-key.pem", "intermediate-key.pem", "fleet"}
PUBLIC = {"root.pem", "intermediate.pem", "revoked.pem"}


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    """A vendor's directory."""
    directory = tmp_path / "vendor"
    init_vendor(directory, "Example Silicon", now=NOW)
    return directory


def chip_in(path: Path) -> Chip:
    return parse_chip_file(path.read_bytes())


def openssl(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *command], capture_output=True, text=True)


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file can be synced."""

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        yield


# The vendor's directory


def test_a_vendor_is_made_with_private_files_that_nobody_else_can_read(vendor: Path) -> None:
    assert {path.name for path in vendor.iterdir()} == PRIVATE | PUBLIC | {"chips"}
    assert vendor.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in vendor.iterdir() if path.is_file()} == dict.fromkeys(
        PRIVATE, 0o600
    ) | dict.fromkeys(PUBLIC, 0o644)
    assert [path.name for path in vendor.parent.iterdir()] == ["vendor"]


def test_what_was_made_is_loaded(vendor: Path) -> None:
    loaded = load_vendor(vendor)
    assert loaded.intermediate.certificate.issuer == loaded.root.subject
    assert loaded.fleet.generation == 1
    assert len(read_revocation_list(vendor).crl) == 0


def test_a_vendor_is_made_in_an_empty_directory_too(tmp_path: Path) -> None:
    init_vendor(tmp_path / "a" / "b", "Example", now=NOW)
    (tmp_path / "empty").mkdir()
    init_vendor(tmp_path / "empty", "Example", now=NOW)
    assert load_vendor(tmp_path / "empty")


def test_a_vendor_is_never_replaced(vendor: Path) -> None:
    before = {path.name: path.read_bytes() for path in vendor.iterdir() if path.is_file()}
    with pytest.raises(AlreadyExists, match="not an empty"):
        init_vendor(vendor, "Example Silicon")
    assert {path.name: path.read_bytes() for path in vendor.iterdir() if path.is_file()} == before
    assert [path.name for path in vendor.parent.iterdir()] == ["vendor"]


@pytest.mark.parametrize("name", ["", "x" * 41, "a\nb"])
def test_a_name_that_cannot_be_in_a_certificate_makes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="vendor's name"):
        init_vendor(tmp_path / "vendor", name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk(monkeypatch), pytest.raises(StorageError, match="No space"):
        init_vendor(tmp_path / "vendor", "Example")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.attack("A24")
@pytest.mark.parametrize("name", ["intermediate-key.pem", "fleet"])
def test_a_private_file_that_others_can_read_is_refused(vendor: Path, name: str) -> None:
    (vendor / name).chmod(0o640)
    with pytest.raises(StorageError, match="can be read by others"):
        load_vendor(vendor)


@pytest.mark.skipif(not is_root(), reason="only root can give a file away")
def test_a_private_file_of_another_user_is_refused(vendor: Path) -> None:
    os.chown(vendor / "fleet", 65533, 65533)
    with pytest.raises(StorageError, match="65533"):
        load_vendor(vendor)


@pytest.mark.parametrize("name", sorted((PRIVATE | PUBLIC) - {"root-key.pem"}))
@pytest.mark.parametrize("content", [b"", b"x", b"x" * 5000, None])
def test_a_damaged_or_missing_file_is_named(vendor: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (vendor / name).unlink()
    else:
        (vendor / name).write_bytes(content)
    with pytest.raises(StorageError, match=name.partition(".")[0]):
        load_vendor(vendor)
        read_revocation_list(vendor)


def test_a_link_in_the_place_of_a_file_is_refused(vendor: Path) -> None:
    (vendor / "fleet").rename(vendor / "elsewhere")
    (vendor / "fleet").symlink_to(vendor / "elsewhere")
    with pytest.raises(StorageError, match="fleet"):
        load_vendor(vendor)


def test_a_key_that_is_not_the_certificates_is_refused(vendor: Path) -> None:
    (vendor / "intermediate-key.pem").write_bytes((vendor / "root-key.pem").read_bytes())
    with pytest.raises(VendorError, match="not the key of"):
        load_vendor(vendor)


@pytest.mark.attack("A15")
def test_every_flipped_bit_in_the_fleets_file_is_refused() -> None:
    fleet = Fleet(b"f" * 16, b"FLEET-SECRET-OF-THIRTY-TWO-BYTES", 1)
    good = encode_fleet(fleet)
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            assert parse_fleet(bytes(bad)) == fleet, f"bit {bit}"
        except VendorError as error:
            assert "FLEET-SECRET" not in str(error)
    assert "FLEET-SECRET" not in repr(fleet)


# Chips


def test_a_chip_is_one_private_file(vendor: Path, tmp_path: Path) -> None:
    chain = manufacture_chip(vendor, tmp_path / "chip", model="SP-1", features=Features.VTPM, now=NOW)
    chip = chip_in(tmp_path / "chip")
    assert (tmp_path / "chip").stat().st_mode & 0o777 == 0o600
    assert chip.certificates == chain.encode()
    assert (chain.chip.chip_id, chain.chip.model, chain.chip.features) == (chip.chip_id, "SP-1", Features.VTPM)
    assert chip.fleet_id == load_vendor(vendor).fleet.fleet_id


def test_no_two_chips_are_alike_and_all_share_the_fleets_secret(vendor: Path, tmp_path: Path) -> None:
    for number in range(5):
        manufacture_chip(vendor, tmp_path / str(number), now=NOW)
    chips = [chip_in(tmp_path / str(number)) for number in range(5)]
    for own in ("chip_id", "storage_root_key", "endorsement_key"):
        assert len({getattr(chip, own) for chip in chips}) == 5
    assert len({(chip.fleet_id, chip.generation, chip.sp_secret) for chip in chips}) == 1


@pytest.mark.claim("B7")
def test_a_newer_chip_reaches_an_older_ones_secret_and_never_the_reverse(vendor: Path, tmp_path: Path) -> None:
    manufacture_chip(vendor, tmp_path / "old", now=NOW)
    assert [raise_generation(vendor) for _ in range(3)] == [2, 3, 4]
    manufacture_chip(vendor, tmp_path / "new", now=NOW)
    old, new = (
        SpSecret(chip.fleet_id, chip.generation, chip.sp_secret)
        for chip in (chip_in(tmp_path / "old"), chip_in(tmp_path / "new"))
    )
    assert (old.generation, new.generation) == (1, 4)
    assert new.at(1) == old
    with pytest.raises(GenerationError, match="newer"):
        old.at(4)


def test_the_last_generation_is_not_raised(vendor: Path) -> None:
    fleet = load_vendor(vendor).fleet
    (vendor / "fleet").write_bytes(encode_fleet(Fleet(fleet.fleet_id, fleet.top_secret, MAX_GENERATION)))
    with pytest.raises(GenerationError, match="last one"):
        raise_generation(vendor)
    assert load_vendor(vendor).fleet.generation == MAX_GENERATION


def test_a_chip_file_is_never_replaced(vendor: Path, tmp_path: Path) -> None:
    (tmp_path / "chip").write_bytes(b"something")
    with pytest.raises(AlreadyExists, match="chip"):
        manufacture_chip(vendor, tmp_path / "chip")
    assert (tmp_path / "chip").read_bytes() == b"something"
    assert list((vendor / "chips").iterdir()) == []


def test_a_chip_file_that_cannot_be_written_leaves_nothing_of_it(
    vendor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        manufacture_chip(vendor, tmp_path / "nowhere" / "chip")
    with full_disk(monkeypatch), pytest.raises(StorageError, match="No space"):
        manufacture_chip(vendor, tmp_path / "chip")
    assert [path.name for path in tmp_path.iterdir()] == ["vendor"]


@pytest.mark.parametrize("model", ["", "x" * 65, "\x1b[2J"])
def test_a_model_that_cannot_be_in_a_certificate_makes_no_chip(vendor: Path, tmp_path: Path, model: str) -> None:
    with pytest.raises(UsageError, match="model"):
        manufacture_chip(vendor, tmp_path / "chip", model=model)
    assert not (tmp_path / "chip").exists()
    assert list((vendor / "chips").iterdir()) == []


def test_a_chip_does_not_outlive_its_vendors_certificate(vendor: Path, tmp_path: Path) -> None:
    late = NOW + authority.INTERMEDIATE_VALIDITY - DAY
    chain = manufacture_chip(vendor, tmp_path / "chip", now=late)
    assert chain.chip_certificate.not_valid_after_utc == chain.intermediate.not_valid_after_utc


# Revocation


def test_a_revoked_chip_is_refused_and_others_are_not(vendor: Path, tmp_path: Path) -> None:
    first, second = (manufacture_chip(vendor, tmp_path / name, now=NOW) for name in ("first", "second"))
    empty = read_revocation_list(vendor)
    genuine(Purpose.CHIP, [first.root], empty, NOW).verify(first)

    revoked = revoke_chip(vendor, first.chip.chip_id, now=NOW)

    after = genuine(Purpose.CHIP, [first.root], revoked, NOW, min_number=revoked.number)
    after.verify(second)
    with pytest.raises(CertificateRevoked):
        after.verify(first)
    with pytest.raises(RevocationUnknown, match="was seen"):
        genuine(Purpose.CHIP, [first.root], empty, NOW, revoked.number).verify(second)


def test_revoked_stays_revoked(vendor: Path, tmp_path: Path) -> None:
    chain = manufacture_chip(vendor, tmp_path / "chip", now=NOW)
    other = manufacture_chip(vendor, tmp_path / "other", now=NOW)
    for step, chip in enumerate((chain, chain, other)):
        revoke_chip(vendor, chip.chip.chip_id, now=NOW + step * DAY)
    refreshed = refresh_revocation_list(vendor, now=NOW + 20 * DAY)
    assert refreshed.number == 5
    assert {entry.serial_number: entry.revocation_date_utc for entry in refreshed.crl} == {
        chain.chip_certificate.serial_number: NOW,
        other.chip_certificate.serial_number: NOW + 2 * DAY,
    }


def test_a_list_ends_and_can_be_refreshed(vendor: Path, tmp_path: Path) -> None:
    chain = manufacture_chip(vendor, tmp_path / "chip", now=NOW)
    late = NOW + authority.REVOCATION_LIST_VALIDITY + timedelta(seconds=1)
    with pytest.raises(RevocationUnknown, match="ended"):
        genuine(Purpose.CHIP, [chain.root], read_revocation_list(vendor), late).verify(chain)
    genuine(Purpose.CHIP, [chain.root], refresh_revocation_list(vendor, now=late), late).verify(chain)
    with pytest.raises(CertificateExpired):
        genuine(Purpose.CHIP, [chain.root], read_revocation_list(vendor), NOW + 21 * 365 * DAY).verify(chain)


def test_a_chip_that_was_never_made_cannot_be_revoked(vendor: Path) -> None:
    with pytest.raises(ChipUnknown, match="63" * 16):
        revoke_chip(vendor, b"c" * 16)
    assert read_revocation_list(vendor).number == 1


def test_revocations_at_once_are_all_kept(vendor: Path, tmp_path: Path) -> None:
    chains = [manufacture_chip(vendor, tmp_path / str(number), now=NOW) for number in range(6)]
    threads = [threading.Thread(target=revoke_chip, args=(vendor, chain.chip.chip_id)) for chain in chains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_revocation_list(vendor)
    assert {entry.serial_number for entry in found.crl} == {chain.chip_certificate.serial_number for chain in chains}
    assert found.number == 7


def test_a_full_disk_leaves_the_old_list(vendor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = manufacture_chip(vendor, tmp_path / "chip", now=NOW)
    with full_disk(monkeypatch), pytest.raises(StorageError, match="No space"):
        revoke_chip(vendor, chain.chip.chip_id)
    assert read_revocation_list(vendor).number == 1
    assert {path.name for path in vendor.iterdir()} == PRIVATE | PUBLIC | {"chips"}


# A stranger with OpenSSL


def test_openssl_verifies_a_chip_and_refuses_it_once_it_is_revoked(tmp_path: Path) -> None:
    vendor = tmp_path / "vendor"
    init_vendor(vendor, "Example Silicon")  # today, as OpenSSL asks for it
    chain = manufacture_chip(vendor, tmp_path / "chip", features=ALL_FEATURES)
    paper = vendor / "chips" / f"{chain.chip.chip_id.hex()}.pem"
    trust: list[str | Path] = [
        "-x509_strict",
        "-CAfile",
        vendor / "root.pem",
        "-untrusted",
        vendor / "intermediate.pem",
    ]
    current: list[str | Path] = ["-crl_check", "-CRLfile", vendor / "revoked.pem"]
    assert openssl("verify", *trust, *current, paper).stdout == f"{paper}: OK\n"

    revoke_chip(vendor, chain.chip.chip_id)

    assert "certificate revoked" in openssl("verify", *trust, *current, paper).stderr
    listed = openssl("crl", "-in", vendor / "revoked.pem", "-noout", "-text", "-CAfile", vendor / "intermediate.pem")
    assert "verify OK" in listed.stderr
    assert f"{chain.chip_certificate.serial_number:X}" in listed.stdout
    for key in ("root-key.pem", "intermediate-key.pem"):
        assert openssl("pkey", "-in", vendor / key, "-noout", "-check").returncode == 0
    assert x509.load_pem_x509_certificate(paper.read_bytes()) == chain.chip_certificate
