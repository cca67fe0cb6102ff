"""The owner's certificate: an ECDSA key on P-384 that signs for itself. Pure, hostile bytes.

It says nothing that anybody has to believe. TLS shows that the other side has the key; the key's fingerprint is the owner.
"""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from spvtpm.wire.certificate_building import Validity, build_self_signed
from spvtpm.wire.certificates import OWNER, parse_certificate

FINGERPRINT_BYTES = 32

ALWAYS = Validity(datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
"""No end that anybody has to watch. Source: RFC 5280, section 4.1.2.5."""

_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "spvtpm owner")])


def build_owner_certificate(key: EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of an owner's key, which is on P-384."""
    return build_self_signed(OWNER, _NAME, key, ALWAYS)


def parse_owner_certificate(der: bytes) -> x509.Certificate:
    """Reads an owner's certificate.

    Raises:
        CertificateError: it is malformed, or not exactly as profiled.
    """
    return parse_certificate(der, OWNER)


def fingerprint(certificate: x509.Certificate) -> bytes:
    """Who the owner is: SHA-256 of the public key (SubjectPublicKeyInfo, DER), 32 bytes."""
    key = certificate.public_key()
    assert isinstance(key, EllipticCurvePublicKey)  # noqa: S101  # as profiled
    digest = Hash(SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize()
