"""The certificates of a secure processor, read strictly: each exactly as its profile says, or refused. Pure, hostile bytes.

    vendor root -> vendor intermediate -> chip EK -> channel key      (and the EKs of vTPMs, beside the channel's)

A chain on the wire is complete: leaf first, root last. Nothing is searched for, so there is one place for each certificate, and
the profile of that place tells what may stand there: key, signature, key usage, path length, and the whole list of extensions.
What is not in the profile is refused, critical or not. That alone says nothing about signatures, time or trust: for these a
chain goes through `certificate_policies.py`. Profiles as tables: docs/formats/certificates.md.

Source: RFC 5280, section 4 (fields and extensions), section 6.1 (basic constraints and path length).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID, SignatureAlgorithmOID

from spvtpm.wire.certificate_extensions import (
    CHANNEL_IDENTITY,
    CHANNEL_PURPOSE,
    CHIP_IDENTITY,
    ChannelIdentity,
    ChipIdentity,
    parse_channel_identity,
    parse_chip_identity,
)
from spvtpm.wire.errors import CertificateError
from spvtpm.wire.vtpm_endorsement import MAX_CERTIFICATE_BYTES

LONGEST_CHANNEL_VALIDITY = timedelta(days=7)
"""A channel certificate is never revoked: it ends soon instead."""

_EXTENSION_NAMES = {
    ExtensionOID.BASIC_CONSTRAINTS: "basic constraints",
    ExtensionOID.KEY_USAGE: "key usage",
    ExtensionOID.EXTENDED_KEY_USAGE: "extended key usage",
    ExtensionOID.SUBJECT_KEY_IDENTIFIER: "subject key identifier",
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER: "authority key identifier",
    CHIP_IDENTITY: "chip identity",
    CHANNEL_IDENTITY: "channel identity",
}
MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    Warning,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for bytes that are no certificate or revocation list, some of it only when a field is read.

A warning is one where warnings are errors; for a number that is not positive, say, or a name's part of a wrong length."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What one kind of certificate looks like.

    Attributes:
        name: as sentences call it.
        curve: the subject's key is an ECDSA key on it. (Each issuer's is on P-384, so each signature is ECDSA with SHA-384.)
        path_length: how many CA certificates may follow; None: it is no CA.
        key_usage: exactly.
        purposes: extended key usage, exactly and in this order; empty: there is none.
        identity: our own extension, if it has one.
        has_issuer: whether it names its issuer's key; a root does not.
        longest: the longest time that it may be valid for, if that is limited.
    """

    name: str
    curve: type[ec.EllipticCurve]
    path_length: int | None
    key_usage: x509.KeyUsage
    purposes: tuple[x509.ObjectIdentifier, ...] = ()
    identity: x509.ObjectIdentifier | None = None
    has_issuer: bool = True
    longest: timedelta | None = None

    def extensions(self) -> dict[x509.ObjectIdentifier, bool]:
        """Every extension that it has, and whether it is critical."""
        found = {
            ExtensionOID.BASIC_CONSTRAINTS: True,
            ExtensionOID.KEY_USAGE: True,
            ExtensionOID.SUBJECT_KEY_IDENTIFIER: False,
        }
        if self.has_issuer:
            found[ExtensionOID.AUTHORITY_KEY_IDENTIFIER] = False
        if self.purposes:
            found[ExtensionOID.EXTENDED_KEY_USAGE] = False
        if self.identity is not None:
            found[self.identity] = False
        return found


def _key_usage(*, signs: bool = False, certificates: bool = False, revocations: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(signs, False, False, False, False, certificates, revocations, False, False)


ROOT = Profile(
    "vendor's root certificate", ec.SECP384R1, 2, _key_usage(certificates=True, revocations=True), has_issuer=False
)
INTERMEDIATE = Profile(
    "vendor's intermediate certificate", ec.SECP384R1, 1, _key_usage(certificates=True, revocations=True)
)
CHIP = Profile("chip certificate", ec.SECP384R1, 0, _key_usage(certificates=True), identity=CHIP_IDENTITY)
CHANNEL = Profile(
    "channel certificate",
    ec.SECP256R1,
    None,
    _key_usage(signs=True),
    purposes=(ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH, CHANNEL_PURPOSE),
    identity=CHANNEL_IDENTITY,
    longest=LONGEST_CHANNEL_VALIDITY,
)
OWNER = Profile(
    "owner's certificate",
    ec.SECP384R1,
    None,
    _key_usage(signs=True),
    purposes=(ExtendedKeyUsageOID.CLIENT_AUTH,),
    has_issuer=False,
)
CONSOLE = Profile(
    "VM's console certificate",
    ec.SECP384R1,
    None,
    _key_usage(signs=True),
    purposes=(ExtendedKeyUsageOID.SERVER_AUTH,),
    has_issuer=False,
)
_PLACES = {3: (CHIP, INTERMEDIATE, ROOT), 4: (CHANNEL, CHIP, INTERMEDIATE, ROOT)}


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain in which each certificate is as its profile says, and all speak of one chip. **Nothing in it is believed yet.**

    Attributes:
        certificates: leaf first, root last; 3 for a chip, 4 for a channel.
        chip: what the vendor is said to say of the chip.
        channel: what the chip is said to say of its firmware, if the leaf is a channel certificate.
    """

    certificates: tuple[x509.Certificate, ...]
    chip: ChipIdentity
    channel: ChannelIdentity | None

    @property
    def chip_certificate(self) -> x509.Certificate:
        """The chip EK's."""
        return self.certificates[-3]

    @property
    def intermediate(self) -> x509.Certificate:
        """The vendor's, which issued the chip's and signs the revocation list."""
        return self.certificates[-2]

    @property
    def root(self) -> x509.Certificate:
        """What the other side calls the vendor's root; to be compared with those that are trusted."""
        return self.certificates[-1]

    def encode(self) -> tuple[bytes, ...]:
        """The chain as it was received: DER, leaf first."""
        return tuple(certificate.public_bytes(Encoding.DER) for certificate in self.certificates)


def parse_chain(certificates: Sequence[bytes]) -> Chain:
    """Reads a chip's or a channel's chain; hostile bytes.

    Args:
        certificates: DER, at most 2,048 bytes each: (channel,) chip EK, vendor intermediate, vendor root.

    Raises:
        CertificateError: a certificate is malformed or not as profiled for its place, or they do not speak of one chip.
    """
    profiles = _PLACES.get(len(certificates))
    if profiles is None:
        raise CertificateError(f"a chain has 3 or 4 certificates, this one has {len(certificates)}")
    parsed = tuple(map(parse_certificate, certificates, profiles))
    chip = parse_chip_identity(_own_extension(parsed[-3], CHIP_IDENTITY))
    _check_subject(parsed[-3], CHIP, chip.chip_id)
    if len(parsed) == 3:
        return Chain(parsed, chip, None)
    channel = parse_channel_identity(_own_extension(parsed[0], CHANNEL_IDENTITY))
    _check_subject(parsed[0], CHANNEL, channel.chip_id)
    if channel.chip_id != chip.chip_id:
        raise CertificateError("the channel certificate names another chip than the chip certificate")
    if int(channel.features) & ~int(
        chip.features
    ):  # as numbers: how flags invert bits without a name differs by Python
        raise CertificateError("the channel certificate claims a feature that the chip certificate does not give")
    return Chain(parsed, chip, channel)


def parse_certificate(der: bytes, profile: Profile) -> x509.Certificate:
    """Reads one certificate; hostile bytes. Its signature is not checked: that takes the issuer.

    Args:
        der: at most 2,048 bytes.
        profile: what it has to be.

    Raises:
        CertificateError: it is malformed, or not exactly as the profile says.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise CertificateError(f"the {profile.name} is longer than {MAX_CERTIFICATE_BYTES} bytes")
    try:
        certificate = x509.load_der_x509_certificate(der)
        check_signature_form(der, certificate.signature)
        _check_profile(certificate, profile)
    except MALFORMED:
        raise CertificateError(f"the {profile.name} is malformed: no X.509 certificate in strict DER") from None
    except CertificateError as error:
        raise CertificateError(f"the {profile.name} {error}") from None
    return certificate


def check_signature_form(der: bytes, signature: bytes) -> None:
    """The count of unused bits before the signature is the one byte that no signature covers; it must be zero.

    Raises:
        CertificateError: it is not.
    """
    if der[-len(signature) - 1 :] != b"\0" + signature:
        raise CertificateError("is malformed: its signature is not strict DER")


def _check_profile(certificate: x509.Certificate, profile: Profile) -> None:
    if certificate.version is not x509.Version.v3:
        raise CertificateError("is no X.509 certificate of version 3")
    if certificate.serial_number <= 0:
        raise CertificateError("has a serial number that is not positive")
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise CertificateError("is not signed with ECDSA and SHA-384")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateError("has a key of another type than ECDSA")
    if not isinstance(key.curve, profile.curve):
        raise CertificateError(f"has a key on the curve {key.curve.name}, not on {profile.curve.name}")
    if not certificate.issuer or not certificate.subject:  # names are read here, or would be only when compared
        raise CertificateError("does not name its issuer or its subject")
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if profile.longest is not None and end - start > profile.longest:
        raise CertificateError(f"is valid for longer than {profile.longest.days} days")
    _check_extension_list(certificate.extensions, profile)
    _check_constraints(certificate.extensions, profile)
    _check_key_identifiers(certificate.extensions, key)


def _check_extension_list(extensions: x509.Extensions, profile: Profile) -> None:
    wanted = profile.extensions()
    for extension in extensions:
        name = _EXTENSION_NAMES.get(extension.oid, extension.oid.dotted_string)
        if extension.oid not in wanted:
            kind = "a critical extension" if extension.critical else "an extension"
            raise CertificateError(f"has {kind} that does not belong there: {name}")
        if extension.critical != wanted.pop(extension.oid):
            marked = "is marked critical, and should not be" if extension.critical else "is not marked critical"
            raise CertificateError(f"has an extension that {marked}: {name}")
    for missing in wanted:
        raise CertificateError(f"lacks an extension: {_EXTENSION_NAMES[missing]}")


def _check_constraints(extensions: x509.Extensions, profile: Profile) -> None:
    constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    if constraints.ca != (profile.path_length is not None):
        raise CertificateError("is one of a CA, and should not be" if constraints.ca else "is not one of a CA")
    if constraints.path_length != profile.path_length:
        raise CertificateError(f"has the path length {constraints.path_length}, not {profile.path_length}")
    if extensions.get_extension_for_class(x509.KeyUsage).value != profile.key_usage:
        raise CertificateError("has a key for another usage")
    if profile.purposes:
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if tuple(purposes) != profile.purposes:
            raise CertificateError("has a key for other purposes (extended key usage)")


def _check_key_identifiers(extensions: x509.Extensions, key: ec.EllipticCurvePublicKey) -> None:
    own = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    if own != x509.SubjectKeyIdentifier.from_public_key(key):
        raise CertificateError("has a subject key identifier that is not its key's")
    for extension in extensions:
        if isinstance(extension.value, x509.AuthorityKeyIdentifier):
            issuer = extension.value
            if issuer.key_identifier is None or issuer.authority_cert_issuer or issuer.authority_cert_serial_number:
                raise CertificateError("names its issuer's key by something else than a key identifier")


def _own_extension(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> bytes:
    value = certificate.extensions.get_extension_for_oid(oid).value
    if not isinstance(value, x509.UnrecognizedExtension):
        raise CertificateError("the library reads our extension as something else")
    return value.value


def _check_subject(certificate: x509.Certificate, profile: Profile, chip_id: bytes) -> None:
    names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)]
    if names != [chip_id.hex()]:
        raise CertificateError(f"the {profile.name} has a subject that names another chip than its extension")
