"""Makes certificates and revocation lists as profiled: for the vendor, and for a chip that certifies its channel key. Pure.

What a builder gives has gone through the parser that its readers use, so it can make nothing that they would refuse.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from spvtpm.wire.certificate_extensions import ChannelIdentity, ChipIdentity
from spvtpm.wire.certificates import CHANNEL, CHIP, INTERMEDIATE, ROOT, Profile, parse_certificate
from spvtpm.wire.revocation import RevocationList, parse_revocation_list

MAX_VENDOR_NAME_LENGTH = 40
"""In characters. The common name adds a few, and has at most 64 (RFC 5280, appendix A.1, ub-common-name)."""

_SERIAL_BITS = 159  # 20 bytes with the sign


@dataclass(frozen=True, slots=True)
class Validity:
    """From when to when, both inclusive, with a time zone, in whole seconds."""

    not_before: datetime
    not_after: datetime

    @classmethod
    def lasting(cls, start: datetime, duration: timedelta) -> Self:
        """From `start` for `duration`."""
        start = start.astimezone(UTC).replace(microsecond=0)
        return cls(start, start + duration)


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA that signs: its certificate and the private key that belongs to it, on P-384."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    def __post_init__(self) -> None:
        if self.key.public_key() != self.certificate.public_key():
            raise ValueError("the private key is not that of the certificate")

    def __repr__(self) -> str:
        return f"Issuer({self.certificate.subject.rfc4514_string()})"


def build_root(key: EllipticCurvePrivateKey, vendor: str, validity: Validity) -> x509.Certificate:
    """A vendor's root, signed by itself.

    Args:
        key: on P-384.
        vendor: the vendor's name, 1 to 40 printable characters.
        validity: decades.

    Raises:
        ValueError: a value is out of bounds.
    """
    return build_self_signed(ROOT, _vendor_name(vendor, "root"), key, validity)


def build_self_signed(
    profile: Profile, subject: x509.Name, key: EllipticCurvePrivateKey, validity: Validity
) -> x509.Certificate:
    """A certificate that its own key signs; `key` on P-384."""
    return _sign(profile, subject, key.public_key(), validity, subject, key)


def build_intermediate(
    issuer: Issuer, key: EllipticCurvePublicKey, vendor: str, validity: Validity
) -> x509.Certificate:
    """A vendor's intermediate, whose key certifies chips and signs the revocation list; `key` on P-384.

    Raises:
        ValueError: a value is out of bounds.
    """
    return _issue(INTERMEDIATE, _vendor_name(vendor, "intermediate"), key, validity, issuer)


def build_chip_certificate(
    issuer: Issuer, key: EllipticCurvePublicKey, identity: ChipIdentity, validity: Validity
) -> x509.Certificate:
    """A chip's: its EK, on P-384, may certify leaves and nothing else.

    Args:
        issuer: the vendor's intermediate.
        key: the chip EK.
        identity: what the vendor says of the chip.
        validity: as long as a chip lives.
    """
    return _issue(CHIP, _chip_name("chip", identity.chip_id), key, validity, issuer, identity.encode())


def build_channel_certificate(
    issuer: Issuer, key: EllipticCurvePublicKey, identity: ChannelIdentity, validity: Validity
) -> x509.Certificate:
    """That of a secure processor's channel key.

    Args:
        issuer: the chip EK.
        key: on P-256, made when the secure processor starts.
        identity: what the chip says of its firmware.
        validity: 7 days at most. Begin a little in the past, for clocks that go after.

    Raises:
        CertificateError: it is valid for longer.
    """
    return _issue(CHANNEL, _chip_name("channel", identity.chip_id), key, validity, issuer, identity.encode())


def build_revocation_list(
    issuer: Issuer, number: int, revoked: Iterable[tuple[int, datetime]], validity: Validity
) -> RevocationList:
    """Which of the issuer's certificates are revoked.

    Args:
        issuer: the vendor's intermediate.
        number: 1 or more; grows with every list.
        revoked: serial number of each revoked certificate, and when it was revoked.
        validity: until when the next list will be there.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(validity.not_before)
        .next_update(validity.not_after)
        .add_extension(_authority(issuer.key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for serial, moment in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment.replace(microsecond=0))
        builder = builder.add_revoked_certificate(entry.build())
    return parse_revocation_list(builder.sign(issuer.key, SHA384()).public_bytes(Encoding.DER))


def new_serial_number() -> int:
    """Random, positive, of 20 bytes. Source: RFC 5280, section 4.1.2.2."""
    return secrets.randbits(_SERIAL_BITS - 1) | 1 << (_SERIAL_BITS - 1)


def _vendor_name(vendor: str, role: str) -> x509.Name:
    if not vendor.isprintable() or not 1 <= len(vendor) <= MAX_VENDOR_NAME_LENGTH or vendor != vendor.strip():
        raise ValueError(
            f"a vendor's name has 1 to {MAX_VENDOR_NAME_LENGTH} printable characters, none blank at its ends"
        )
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, vendor),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{vendor} {role}"),
        ]
    )


def _chip_name(role: str, chip_id: bytes) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, f"secure processor {role}"),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, chip_id.hex()),
        ]
    )


def _authority(key: EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _issue(
    profile: Profile,
    subject: x509.Name,
    key: EllipticCurvePublicKey,
    validity: Validity,
    issuer: Issuer,
    identity: bytes = b"",
) -> x509.Certificate:
    return _sign(profile, subject, key, validity, issuer.certificate.subject, issuer.key, identity)


def _sign(
    profile: Profile,
    subject: x509.Name,
    key: EllipticCurvePublicKey,
    validity: Validity,
    issuer: x509.Name,
    issuer_key: EllipticCurvePrivateKey,
    identity: bytes = b"",
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .serial_number(new_serial_number())
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .not_valid_before(validity.not_before)
        .not_valid_after(validity.not_after)
    )
    for value in _extension_values(profile, key, issuer_key, identity):
        builder = builder.add_extension(value, critical=profile.extensions()[value.oid])
    return parse_certificate(builder.sign(issuer_key, SHA384()).public_bytes(Encoding.DER), profile)


def _extension_values(
    profile: Profile, key: EllipticCurvePublicKey, issuer_key: EllipticCurvePrivateKey, identity: bytes
) -> list[x509.ExtensionType]:
    values: list[x509.ExtensionType] = [
        x509.BasicConstraints(profile.path_length is not None, profile.path_length),
        profile.key_usage,
        x509.SubjectKeyIdentifier.from_public_key(key),
    ]
    if profile.has_issuer:
        values.append(_authority(issuer_key.public_key()))
    if profile.purposes:
        values.append(x509.ExtendedKeyUsage(profile.purposes))
    if profile.identity is not None:
        values.append(x509.UnrecognizedExtension(profile.identity, identity))
    return values
