"""Vendors, chips and channel certificates in memory, and a forger who signs what no builder of ours would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.files import create_file
from spvtpm.vendor.authority import Vendor
from spvtpm.vendor.factory import ALL_FEATURES, make_chip
from spvtpm.vendor.fleet import new_fleet
from spvtpm.wire.certificate_building import (
    Issuer,
    Validity,
    build_channel_certificate,
    build_intermediate,
    build_revocation_list,
    build_root,
)
from spvtpm.wire.certificate_extensions import ChannelIdentity, Features
from spvtpm.wire.certificate_policies import AllOf, Purpose, genuine
from spvtpm.wire.chip_file import Chip, encode_chip_file
from spvtpm.wire.revocation import RevocationList

NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@dataclass(frozen=True)
class Papers:
    """A vendor with all its keys, and one of its chips with a running channel.

    Attributes:
        root, intermediate, chip: who signs.
        vendor: what the factory needs.
        made: the chip itself.
        channel: the DER chain that a running secure processor shows.
    """

    root: Issuer
    intermediate: Issuer
    vendor: Vendor
    made: Chip
    chip: Issuer
    channel: tuple[bytes, ...]

    @property
    def chip_chain(self) -> tuple[bytes, ...]:
        """The DER chain of the chip alone."""
        return self.made.certificates

    def revocation_list(self, revoked: Iterable[int] = (), number: int = 1, at: datetime = NOW) -> RevocationList:
        """The vendor's list with these serial numbers, for 30 days."""
        entries = [(serial, at) for serial in revoked]
        return build_revocation_list(self.intermediate, number, entries, Validity.lasting(at, 30 * DAY))

    def genuine(self, purpose: Purpose = Purpose.CHANNEL, at: datetime = NOW) -> AllOf:
        """What a terminal that trusts this vendor asks of every chain."""
        return genuine(purpose, [self.root.certificate], self.revocation_list(), at)


def new_papers(name: str = "Example Silicon", start: datetime = NOW - DAY) -> Papers:
    """A vendor, a chip, a channel."""
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(2)]
    validity = Validity.lasting(start, 10_000 * DAY)
    root = Issuer(build_root(keys[0], name, validity), keys[0])
    intermediate = Issuer(build_intermediate(root, keys[1].public_key(), name, validity), keys[1])
    vendor = Vendor(root.certificate, intermediate, new_fleet())
    made = make_chip(vendor, "test chip", ALL_FEATURES, start)
    chip = made.issuer()
    return Papers(root, intermediate, vendor, made, chip, channel_chain(made, start=start))


@cache
def papers() -> Papers:
    """One vendor for all tests that change nothing."""
    return new_papers()


@cache
def todays_papers() -> Papers:
    """A vendor whose certificates are valid now, for real secure processors."""
    return new_papers(start=datetime.now(UTC) - DAY)


def put_chip_file(path: Path, of: Papers | None = None) -> Chip:
    """A new chip of this vendor, or of today's, as a file that a secure processor takes."""
    chip = make_chip((of or todays_papers()).vendor, "test chip", ALL_FEATURES, datetime.now(UTC))
    create_file(path, encode_chip_file(chip))
    return chip


def channel_chain(
    chip: Chip, firmware: int = 7, features: Features = ALL_FEATURES, start: datetime = NOW - DAY
) -> tuple[bytes, ...]:
    """What a secure processor on this chip shows, valid for a week."""
    return (channel_certificate(chip.issuer(), chip.chip_id, firmware, features, start), *chip.certificates)


def channel_certificate(
    chip: Issuer, chip_id: bytes, firmware: int = 7, features: Features = ALL_FEATURES, start: datetime = NOW - DAY
) -> bytes:
    """DER: a new channel key, certified by a chip."""
    identity = ChannelIdentity(chip_id, firmware, features)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return der(build_channel_certificate(chip, key, identity, Validity.lasting(start, 7 * DAY)))


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def forged(
    der_before: bytes,
    signer: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    *,
    key: PublicKey | None = None,
    subject: x509.Name | None = None,
    issuer: x509.Name | None = None,
    validity: Validity | None = None,
    extensions: Iterable[tuple[x509.ExtensionType, bool]] = (),
    without: Iterable[x509.ObjectIdentifier] = (),
    algorithm: SHA256 | SHA384 | None = None,
) -> bytes:
    """The certificate with these changes, signed anew by whom you like. A given extension replaces that of the same OID."""
    old = x509.load_der_x509_certificate(der_before)
    new = {extension.oid: (extension.value, extension.critical) for extension in old.extensions}
    new |= {value.oid: (value, critical) for value, critical in extensions}
    if key is not None and x509.SubjectKeyIdentifier.oid not in {value.oid for value, _critical in extensions}:
        new[x509.SubjectKeyIdentifier.oid] = (x509.SubjectKeyIdentifier.from_public_key(key), False)
    old_key = old.public_key()
    assert isinstance(old_key, ec.EllipticCurvePublicKey)
    builder = (
        x509.CertificateBuilder()
        .serial_number(old.serial_number)
        .issuer_name(issuer or old.issuer)
        .subject_name(old.subject if subject is None else subject)
        .public_key(key or old_key)
        .not_valid_before(validity.not_before if validity else old.not_valid_before_utc)
        .not_valid_after(validity.not_after if validity else old.not_valid_after_utc)
    )
    for oid, (value, critical) in new.items():
        if oid not in set(without):
            builder = builder.add_extension(value, critical)
    return der(builder.sign(signer, algorithm or SHA384()))
