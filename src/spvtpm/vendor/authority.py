"""The vendor's keys and papers: made once, then loaded to make chips, to revoke them, and to raise the fleet's generation.

The vendor's directory, mode 0700:

    root-key.pem, intermediate-key.pem   private keys, PKCS#8; mode 0600
    root.pem, intermediate.pem           their certificates, for everybody
    revoked.pem                          the newest revocation list, for everybody
    fleet                                the fleet's id, top secret and present generation; mode 0600
    chips/<chip id>.pem                  the certificate of each chip ever made

The root's key signs nothing but the intermediate. After `init_vendor` nothing here reads it: put it away.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from spvtpm.files import PUBLIC, create_file, locked, read_file, replace_file, sync_directory
from spvtpm.vendor.fleet import MAX_FLEET_FILE_BYTES, Fleet, encode_fleet, new_fleet, parse_fleet
from spvtpm.wire.certificate_building import (
    Issuer,
    Validity,
    build_intermediate,
    build_revocation_list,
    build_root,
)
from spvtpm.wire.certificates import INTERMEDIATE, ROOT, Profile, parse_certificate
from spvtpm.wire.errors import (
    AlreadyExists,
    CertificateError,
    ChipUnknown,
    GenerationError,
    StorageError,
    UsageError,
    VendorError,
)
from spvtpm.wire.generations import MAX_GENERATION
from spvtpm.wire.revocation import MAX_REVOCATION_LIST_BYTES, RevocationList, parse_revocation_list

ROOT_VALIDITY = timedelta(days=40 * 365)
INTERMEDIATE_VALIDITY = timedelta(days=30 * 365)
REVOCATION_LIST_VALIDITY = timedelta(days=30)

REVOCATION_LIST_FILE = "revoked.pem"
"""In a vendor's directory: the newest list, for everybody."""

_MAX_PEM_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Vendor:
    """What the vendor needs to make chips.

    Attributes:
        root: the root's certificate.
        intermediate: certificate and private key.
        fleet: the fleet's secrets.
    """

    root: x509.Certificate
    intermediate: Issuer
    fleet: Fleet


def init_vendor(directory: Path, name: str, *, now: datetime | None = None) -> None:
    """Makes a vendor: keys, certificates, an empty revocation list and a fleet of generation 1. Whole or not at all.

    Args:
        directory: must not exist, or be empty.
        name: the vendor's, 1 to 40 printable characters.
        now: the time, with a time zone.

    Raises:
        AlreadyExists: something is there.
        UsageError: the name cannot be in a certificate.
        StorageError: it cannot be written.
    """
    now = now or datetime.now(UTC)
    beside = directory.absolute().with_name(f".{directory.absolute().name}.{os.urandom(4).hex()}")
    try:
        beside.mkdir(mode=0o700, parents=True)
        try:
            _write_new(beside, name, now)
            beside.rename(directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        sync_directory(directory.absolute().parent)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise AlreadyExists(f"{directory} exists already, and is not an empty directory") from None
        raise StorageError(f"cannot make {directory}: {error.strerror}") from None


def load_vendor(directory: Path) -> Vendor:
    """Reads what it takes to make chips.

    Raises:
        StorageError: a file is missing, damaged (`VendorError`), or a private one open to others.
    """
    root = _read_certificate(directory / "root.pem", ROOT)
    certificate = _read_certificate(directory / "intermediate.pem", INTERMEDIATE)
    key = _read_key(directory / "intermediate-key.pem")
    if key.public_key() != certificate.public_key():
        raise VendorError(f"{directory / 'intermediate-key.pem'} is not the key of intermediate.pem")
    fleet = parse_fleet(read_file(directory / "fleet", MAX_FLEET_FILE_BYTES))
    return Vendor(root, Issuer(certificate, key), fleet)


def read_revocation_list(directory: Path) -> RevocationList:
    """The newest list.

    Raises:
        StorageError: it is missing, or damaged (`VendorError`).
    """
    path = directory / REVOCATION_LIST_FILE
    content = read_file(path, 2 * MAX_REVOCATION_LIST_BYTES, private=False)
    try:
        return parse_revocation_list(x509.load_pem_x509_crl(content).public_bytes(Encoding.DER))
    except (ValueError, CertificateError):
        raise VendorError(f"{path} is no revocation list of this vendor") from None


def revoke_chip(directory: Path, chip_id: bytes, *, now: datetime | None = None) -> RevocationList:
    """Puts a chip on the list, for good, and gives the new list; a chip that is on it stays there.

    Args:
        directory: the vendor's.
        chip_id: 16 bytes.
        now: the time, with a time zone.

    Raises:
        ChipUnknown: this vendor has made no such chip.
        StorageError: a file cannot be read or written.
    """
    path = directory / "chips" / f"{chip_id.hex()}.pem"
    if not path.is_file():
        raise ChipUnknown(f"the vendor in {directory} has made no chip {chip_id.hex()}")
    try:
        serial = x509.load_pem_x509_certificate(read_file(path, _MAX_PEM_BYTES, private=False)).serial_number
    except ValueError:
        raise VendorError(f"{path} is no certificate") from None
    return _publish(directory, [serial], now or datetime.now(UTC))


def refresh_revocation_list(directory: Path, *, now: datetime | None = None) -> RevocationList:
    """The same list anew, for another 30 days. Do it in time: readers refuse a list that has ended.

    Raises:
        StorageError: a file cannot be read or written.
    """
    return _publish(directory, [], now or datetime.now(UTC))


def raise_generation(directory: Path) -> int:
    """Begins the fleet's next generation: chips made from now on get it. Gives its number.

    Raises:
        GenerationError: the last one is reached.
        StorageError: a file cannot be read or written.
    """
    path = directory / "fleet"
    with locked(directory):
        fleet = parse_fleet(read_file(path, MAX_FLEET_FILE_BYTES))
        if fleet.generation == MAX_GENERATION:
            raise GenerationError(f"generation {MAX_GENERATION} is the last one: begin a new fleet")
        raised = Fleet(fleet.fleet_id, fleet.top_secret, fleet.generation + 1)
        replace_file(path, encode_fleet(raised))
    return raised.generation


def to_pem(certificate: x509.Certificate) -> bytes:
    """As OpenSSL reads it."""
    return certificate.public_bytes(Encoding.PEM)


def _write_new(directory: Path, name: str, now: datetime) -> None:
    root_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    root = Issuer(build_root(root_key, name, Validity.lasting(now, ROOT_VALIDITY)), root_key)
    certificate = build_intermediate(root, key.public_key(), name, Validity.lasting(now, INTERMEDIATE_VALIDITY))
    validity = Validity.lasting(now, REVOCATION_LIST_VALIDITY)
    revoked = build_revocation_list(Issuer(certificate, key), 1, [], validity)
    create_file(directory / "root-key.pem", _private_pem(root_key))
    create_file(directory / "root.pem", to_pem(root.certificate), PUBLIC)
    create_file(directory / "intermediate-key.pem", _private_pem(key))
    create_file(directory / "intermediate.pem", to_pem(certificate), PUBLIC)
    create_file(directory / REVOCATION_LIST_FILE, revoked.crl.public_bytes(Encoding.PEM), PUBLIC)
    create_file(directory / "fleet", encode_fleet(new_fleet()))
    (directory / "chips").mkdir()


def _publish(directory: Path, serials: list[int], now: datetime) -> RevocationList:
    issuer = load_vendor(directory).intermediate
    with locked(directory):
        old = read_revocation_list(directory)
        revoked = {entry.serial_number: entry.revocation_date_utc for entry in old.crl}
        for serial in serials:
            revoked.setdefault(serial, now.astimezone(UTC))
        validity = Validity.lasting(now, REVOCATION_LIST_VALIDITY)
        new = build_revocation_list(issuer, old.number + 1, revoked.items(), validity)
        replace_file(directory / REVOCATION_LIST_FILE, new.crl.public_bytes(Encoding.PEM), PUBLIC)
    return new


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_certificate(path: Path, profile: Profile) -> x509.Certificate:
    content = read_file(path, _MAX_PEM_BYTES, private=False)
    try:
        der = x509.load_pem_x509_certificate(content).public_bytes(Encoding.DER)
        return parse_certificate(der, profile)
    except (ValueError, CertificateError):
        raise VendorError(f"{path} is no {profile.name}") from None


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    content = read_file(path, _MAX_PEM_BYTES)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise VendorError(f"{path} is no private key in PEM without a passphrase") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise VendorError(f"{path} is no ECDSA key")
    return key
