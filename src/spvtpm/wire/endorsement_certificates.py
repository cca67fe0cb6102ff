"""The certificate of a vTPM's endorsement key (EK): built by a chip, read strictly by everybody else. Pure, hostile bytes.

    vendor root -> vendor intermediate -> chip EK -> EK of a vTPM

It says: this key was derived by the vTPM with this id, inside this chip. The vTPM's id stands in the subject, so that nobody can
show another vTPM's certificate in its place; it is valid as long as the chip's own, because the host sets the clock.

Source: TCG EK Credential Profile for TPM Family 2.0 (2.5), section 3.2. As a table: docs/formats/endorsement-certificates.md.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from spvtpm.wire.certificate_building import Issuer, new_serial_number
from spvtpm.wire.certificate_policies import ChainPolicy, verify_issued_by
from spvtpm.wire.certificates import MALFORMED, Chain, check_signature_form, parse_chain
from spvtpm.wire.ek_templates import ECC_P256, ECC_P384, EK_TEMPLATES, RSA_2048, EkTemplate
from spvtpm.wire.errors import CertificateError, UntrustedIssuer
from spvtpm.wire.vtpm_endorsement import MAX_CERTIFICATE_BYTES, VtpmEndorsement

_TCG = "2.23.133"
_MANUFACTURER = x509.ObjectIdentifier(f"{_TCG}.2.1")
_MODEL = x509.ObjectIdentifier(f"{_TCG}.2.2")
_VERSION = x509.ObjectIdentifier(f"{_TCG}.2.3")
EK_PURPOSE: Final = x509.ObjectIdentifier(f"{_TCG}.8.1")
"""tcg-kp-EKCertificate. Source: TCG EK Credential Profile 2.5, section 3.2.16; the others, section 3.2.9."""

_DIRECTORY_ATTRIBUTES = x509.ObjectIdentifier("2.5.29.9")
"""Source: RFC 5280, section 4.2.1.8."""

MODEL: Final = "spvtpm"
_SUBJECT: Final = "vTPM endorsement key"
_ID = re.compile(r"\Aid:[0-9A-F]{8}\Z")
_SPECIFICATION_HEAD = bytes.fromhex("06056781050210")  # OID 2.23.133.2.16, tPMSpecification
_FAMILY = bytes.fromhex("0c03322e30")  # UTF8String "2.0"
_LARGEST = 255

EkPublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class TpmMake:
    """Which TPM it is, as TPM2_GetCapability tells.

    Attributes:
        manufacturer: TPM_PT_MANUFACTURER, 32 bits.
        firmware: TPM_PT_FIRMWARE_VERSION_1, 32 bits.
        level, revision: of the TPM specification, TPM_PT_LEVEL and TPM_PT_REVISION; 0 to 255.
    """

    manufacturer: int
    firmware: int
    level: int
    revision: int


@dataclass(frozen=True, slots=True)
class EkCertificate:
    """The certificate of an EK, exactly as profiled. **Nothing in it is believed yet.**

    Attributes:
        certificate: itself.
        template: whose key it certifies.
        vtpm_id: of the vTPM that is said to have derived the key.
        make: which TPM it is said to be.
    """

    certificate: x509.Certificate
    template: EkTemplate
    vtpm_id: uuid.UUID
    make: TpmMake

    @property
    def public(self) -> bytes:
        """The whole public area (TPMT_PUBLIC) of the certified key."""
        return self.template.encode_public(*_parts(_ek_public_key(self.certificate)))

    def encode(self) -> bytes:
        """DER."""
        return self.certificate.public_bytes(Encoding.DER)


def build_ek_certificate(
    issuer: Issuer, template: EkTemplate, public: bytes, vtpm_id: uuid.UUID, make: TpmMake
) -> EkCertificate:
    """That of an EK. **Only for a key that the SP has just derived from the vTPM's seed**, never for one out of a TPM in use.

    Args:
        issuer: the chip EK.
        template: whose key it is.
        public: the key's public area, TPMT_PUBLIC.
        vtpm_id: of the vTPM.
        make: which TPM it is.

    Raises:
        CertificateError: the public area is not one of the template's.
    """
    key = _key_of(template, public)
    builder = (
        x509.CertificateBuilder()
        .serial_number(new_serial_number())
        .issuer_name(issuer.certificate.subject)
        .subject_name(_subject(vtpm_id))
        .public_key(key)
        .not_valid_before(issuer.certificate.not_valid_before_utc)
        .not_valid_after(issuer.certificate.not_valid_after_utc)
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    for extension in _extensions(key, make, authority):
        builder = builder.add_extension(extension.value, extension.critical)
    return parse_ek_certificate(builder.sign(issuer.key, SHA384()).public_bytes(Encoding.DER))


def parse_ek_certificate(der: bytes) -> EkCertificate:
    """Reads one certificate; hostile bytes. Who signed it is not checked: that takes the issuer's.

    Args:
        der: at most 2,048 bytes.

    Raises:
        CertificateError: it is malformed, or not exactly as profiled.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise CertificateError(f"the EK certificate is longer than {MAX_CERTIFICATE_BYTES} bytes")
    try:
        certificate = x509.load_der_x509_certificate(der)
        check_signature_form(der, certificate.signature)
        return _read(certificate)
    except MALFORMED:
        raise CertificateError("the EK certificate is malformed: no X.509 certificate in strict DER") from None
    except x509.ExtensionNotFound:
        raise CertificateError("the EK certificate lacks an extension of its profile") from None
    except CertificateError as error:
        raise CertificateError(f"the EK certificate {error}") from None


def verify_endorsed(ek: EkCertificate, chain: Chain, vtpm_id: uuid.UUID) -> None:
    """Whether this chip certified the EK, and as one of this vTPM.

    Args:
        ek: the certificate.
        chain: the chip's, already verified with the policies of the reader.
        vtpm_id: of the vTPM that the reader speaks of.

    Raises:
        UntrustedIssuer: it did not, or it is another vTPM's EK.
    """
    verify_issued_by(ek.certificate, chain.chip_certificate, "EK certificate")
    if ek.vtpm_id != vtpm_id:
        raise UntrustedIssuer(f"the EK certificate is one of the vTPM {ek.vtpm_id}, not of {vtpm_id}")


def verify_endorsement(
    endorsement: VtpmEndorsement, vtpm_id: uuid.UUID, policy: ChainPolicy
) -> tuple[EkCertificate, ...]:
    """The EK certificates of a vTPM, each of them verified.

    Args:
        endorsement: from whomever.
        vtpm_id: of the vTPM that the reader speaks of.
        policy: what the chip's chain has to show: `genuine(Purpose.CHIP, …)` and more.

    Raises:
        CertificateError: a certificate is malformed.
        CertificateRefused: by the policy, or a certificate is not this chip's for this vTPM.
    """
    chain = parse_chain(endorsement.issuer)
    policy.verify(chain)
    return verify_all_endorsed(endorsement, chain, vtpm_id)


def verify_all_endorsed(endorsement: VtpmEndorsement, chain: Chain, vtpm_id: uuid.UUID) -> tuple[EkCertificate, ...]:
    """As `verify_endorsement`, where the issuer's chain is verified already.

    Raises:
        CertificateError: a certificate is malformed.
        UntrustedIssuer: one is not this chip's for this vTPM.
    """
    certificates = tuple(map(parse_ek_certificate, endorsement.certificates))
    for ek in certificates:
        verify_endorsed(ek, chain, vtpm_id)
    return certificates


def verify_public(ek: EkCertificate, public: bytes) -> None:
    """Whether this is the public area of the certified key: what a TPM shows as its EK.

    Raises:
        UntrustedIssuer: it is another key, or the same with other attributes.
    """
    if public != ek.public:
        raise UntrustedIssuer(f"the key is not the {ek.template.name} that the certificate is for")


def _read(certificate: x509.Certificate) -> EkCertificate:
    if certificate.version is not x509.Version.v3 or certificate.serial_number <= 0:
        raise CertificateError("is no X.509 certificate of version 3 with a positive serial number")
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise CertificateError("is not signed with ECDSA and SHA-384")
    if not certificate.issuer:
        raise CertificateError("does not name its issuer")
    key = _ek_public_key(certificate)
    template = _template_of(key)
    vtpm_id = _vtpm_id(certificate.subject)
    make = _make(certificate.extensions)
    authority = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    if authority.key_identifier is None or authority.authority_cert_issuer or authority.authority_cert_serial_number:
        raise CertificateError("names its issuer's key by something else than a key identifier")
    if list(certificate.extensions) != _extensions(key, make, authority):
        raise CertificateError("has not exactly the extensions of its profile")
    return EkCertificate(certificate, template, vtpm_id, make)


def _extensions(
    key: EkPublicKey, make: TpmMake, authority: x509.AuthorityKeyIdentifier
) -> list[x509.Extension[x509.ExtensionType]]:
    """All extensions of the profile, in order: what is built, and what alone is accepted."""
    is_rsa = isinstance(key, rsa.RSAPublicKey)
    usage = x509.KeyUsage(False, False, is_rsa, False, not is_rsa, False, False, False, False)
    name = [
        x509.NameAttribute(_MANUFACTURER, f"id:{make.manufacturer:08X}"),
        x509.NameAttribute(_MODEL, MODEL),
        x509.NameAttribute(_VERSION, f"id:{make.firmware:08X}"),
    ]
    values: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (usage, True),
        (x509.ExtendedKeyUsage([EK_PURPOSE]), False),
        (x509.SubjectAlternativeName([x509.DirectoryName(x509.Name(name))]), False),
        (x509.UnrecognizedExtension(_DIRECTORY_ATTRIBUTES, _specification(make.level, make.revision)), False),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
        (authority, False),
    ]
    return [x509.Extension(value.oid, critical, value) for value, critical in values]


def _der(tag: int, content: bytes) -> bytes:
    assert len(content) < 0x80  # noqa: S101  # the short form of a length
    return bytes([tag, len(content)]) + content


def _specification(level: int, revision: int) -> bytes:
    """Subject directory attributes with the TPM specification: family, level, revision. Source: as above, section 3.2.10."""
    numbers = b"".join(_der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big")) for number in (level, revision))
    return _der(0x30, _der(0x30, _SPECIFICATION_HEAD + _der(0x31, _der(0x30, _FAMILY + numbers))))


def _make(extensions: x509.Extensions) -> TpmMake:
    """What the certificate says of the TPM. That it says it in the right words is seen when the extensions are compared."""
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DirectoryName
    )
    found = {attribute.oid: str(attribute.value) for name in names for attribute in name}
    ids = [found.get(oid, "") for oid in (_MANUFACTURER, _VERSION)]
    if not all(map(_ID.match, ids)):
        raise CertificateError("does not name manufacturer and version of the TPM as it should")
    attributes = extensions.get_extension_for_oid(_DIRECTORY_ATTRIBUTES).value
    value = attributes.value if isinstance(attributes, x509.UnrecognizedExtension) else b""
    return TpmMake(int(ids[0][3:], 16), int(ids[1][3:], 16), *_level_and_revision(value))


def _level_and_revision(specification: bytes) -> tuple[int, int]:
    numbers = specification.rpartition(_FAMILY)[2]
    size = int.from_bytes(numbers[1:2], "big")
    level, revision = (int.from_bytes(part, "big") for part in (numbers[2 : 2 + size], numbers[4 + size :]))
    if max(level, revision) > _LARGEST:
        raise CertificateError("names a TPM specification that there is none of")
    return level, revision


def _vtpm_id(subject: x509.Name) -> uuid.UUID:
    texts = [str(attribute.value) for attribute in subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)]
    try:
        vtpm_id = uuid.UUID(texts[0])
    except (IndexError, ValueError):
        raise CertificateError("does not name a vTPM as it should") from None
    if subject != _subject(vtpm_id):
        raise CertificateError("does not name a vTPM as it should")
    return vtpm_id


def _subject(vtpm_id: uuid.UUID) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, _SUBJECT),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, str(vtpm_id)),
        ]
    )


def _key_of(template: EkTemplate, public: bytes) -> EkPublicKey:
    numbers = [int.from_bytes(part, "big") for part in template.parse_public(public)]
    try:
        if template is RSA_2048:
            return rsa.RSAPublicNumbers(_RSA_EXPONENT, numbers[0]).public_key()
        return ec.EllipticCurvePublicNumbers(numbers[0], numbers[1], _CURVES[template]()).public_key()
    except ValueError:
        raise CertificateError(f"a public area of the {template.name} holds no key") from None


_RSA_EXPONENT: Final = 65537
"""What exponent 0 in a template stands for. Source: TCG TPM 2.0 Library Part 2, section "TPMS_RSA_PARMS"."""

_CURVES: Final[dict[EkTemplate, type[ec.EllipticCurve]]] = {ECC_P256: ec.SECP256R1, ECC_P384: ec.SECP384R1}


def _template_of(key: EkPublicKey) -> EkTemplate:
    for template in EK_TEMPLATES:
        if tuple(map(len, _parts(key))) == template.parts:
            return template
    raise CertificateError("has a key of no standard EK template")


def _ek_public_key(certificate: x509.Certificate) -> EkPublicKey:
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and (key.key_size, key.public_numbers().e) == (2048, _RSA_EXPONENT):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, tuple(_CURVES.values())):
        return key
    raise CertificateError("has a key of no standard EK template")


def _parts(key: EkPublicKey) -> tuple[bytes, ...]:
    if isinstance(key, rsa.RSAPublicKey):
        return (key.public_numbers().n.to_bytes(key.key_size // 8, "big"),)
    numbers, size = key.public_numbers(), key.curve.key_size // 8
    return (numbers.x.to_bytes(size, "big"), numbers.y.to_bytes(size, "big"))
