"""The vendor's list of revoked chips: an X.509 revocation list (CRL), read strictly. Pure, hostile bytes.

Source: RFC 5280, section 5. One list for all certificates of one intermediate: no deltas, no partitions, no other issuer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from spvtpm.wire.certificates import MALFORMED, check_signature_form
from spvtpm.wire.errors import CertificateError, CertificateRevoked, RevocationUnknown

MAX_REVOCATION_LIST_BYTES = 1 << 20
"""Room for more than 25,000 revoked chips."""

_EXTENSIONS = {ExtensionOID.AUTHORITY_KEY_IDENTIFIER, ExtensionOID.CRL_NUMBER}


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A list as profiled. **Its signature is not checked yet**: `verify` does, against the certificate of its issuer.

    Attributes:
        crl: the list.
        number: grows with every list of the issuer.
        next_update: until when another list will be there; this one says nothing after that.
    """

    crl: x509.CertificateRevocationList
    number: int
    next_update: datetime

    def verify(self, certificate: x509.Certificate, issuer: x509.Certificate, time: datetime, min_number: int) -> None:
        """Whether this is the issuer's list, current at `time`, and does not hold the certificate.

        Raises:
            RevocationUnknown: another issuer's list, or too old to tell.
            CertificateRevoked: the list holds the certificate.
        """
        key = issuer.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or self.crl.issuer != issuer.subject:
            raise RevocationUnknown("the revocation list is not of the chip's vendor")
        authority = self.crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        if authority.key_identifier != x509.SubjectKeyIdentifier.from_public_key(key).digest:
            raise RevocationUnknown("the revocation list names another key than that of the chip's vendor")
        if not self.crl.is_signature_valid(key):
            raise RevocationUnknown("the revocation list is not signed by the chip's vendor")
        if time < self.crl.last_update_utc:
            raise RevocationUnknown("the revocation list is from the future")
        if time > self.next_update:
            raise RevocationUnknown(f"the revocation list ended on {self.next_update:%Y-%m-%d}")
        if self.number < min_number:
            raise RevocationUnknown(f"the revocation list has number {self.number}, and number {min_number} was seen")
        if self.crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            raise CertificateRevoked("the vendor has revoked this chip")

    def encode(self) -> bytes:
        """The list as it was received: DER."""
        return self.crl.public_bytes(Encoding.DER)


def parse_revocation_list(der: bytes) -> RevocationList:
    """Reads a list; hostile bytes.

    Args:
        der: at most 1 MiB.

    Raises:
        CertificateError: it is malformed, or not exactly as profiled.
    """
    if len(der) > MAX_REVOCATION_LIST_BYTES:
        raise CertificateError(f"the revocation list is longer than {MAX_REVOCATION_LIST_BYTES} bytes")
    try:
        crl = x509.load_der_x509_crl(der)
        check_signature_form(der, crl.signature)
        return _checked(crl)
    except MALFORMED:
        raise CertificateError("the revocation list is malformed: no X.509 CRL in strict DER") from None
    except CertificateError as error:
        raise CertificateError(f"the revocation list {error}") from None


def _checked(crl: x509.CertificateRevocationList) -> RevocationList:
    if crl.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise CertificateError("is not signed with ECDSA and SHA-384")
    if not crl.issuer or crl.next_update_utc is None or crl.next_update_utc < crl.last_update_utc:
        raise CertificateError("does not say whose it is, or when the next one comes")
    found = {extension.oid: extension.critical for extension in crl.extensions}
    if set(found) != _EXTENSIONS or any(found.values()):
        raise CertificateError("has other extensions than its issuer's key identifier and its number")
    number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    if number < 1:
        raise CertificateError("has no number")
    return RevocationList(crl, number, crl.next_update_utc)
