"""The certificates of vTPMs' EKs: what is built is what is accepted, and nothing else is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spvtpm.wire.certificate_policies import Purpose
from spvtpm.wire.certificates import parse_chain
from spvtpm.wire.ek_templates import ECC_P256, ECC_P384, EK_TEMPLATES, RSA_2048, EkTemplate
from spvtpm.wire.endorsement_certificates import (
    EK_PURPOSE,
    build_ek_certificate,
    parse_ek_certificate,
    verify_endorsed,
    verify_endorsement,
    verify_public,
)
from spvtpm.wire.errors import CertificateError, MessageError, SpvtpmError, UntrustedIssuer
from spvtpm.wire.vtpm_endorsement import (
    MAX_CERTIFICATE_BYTES,
    VtpmEndorsement,
    encode_endorsement,
    parse_endorsement,
)
from tests.endorsements import MAKE, OTHER_VTPM, VTPM, new_certificate, new_endorsement, new_public
from tests.papers import forged, new_papers, papers

pytestmark = [pytest.mark.claim("C7"), pytest.mark.attack("A20")]

templates = pytest.mark.parametrize("template", EK_TEMPLATES, ids=lambda template: template.name)
Extensions = Iterable[tuple[x509.ExtensionType, bool]]


@templates
def test_what_is_built_says_which_key_of_which_vtpm_it_is(template: EkTemplate) -> None:
    public = new_public(template)
    read = parse_ek_certificate(build_ek_certificate(papers().chip, template, public, VTPM, MAKE).encode())
    assert (read.template, read.vtpm_id, read.make, read.public) == (template, VTPM, MAKE, public)
    assert len(read.encode()) <= MAX_CERTIFICATE_BYTES
    verify_public(read, public)
    verify_endorsed(read, parse_chain(papers().chip_chain), VTPM)


@templates
def test_the_profile_is_that_of_the_standard(template: EkTemplate) -> None:
    """TCG EK Credential Profile 2.5, section 3.2, read with the library alone."""
    certificate = new_certificate(papers(), template).certificate
    extensions = certificate.extensions
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_encipherment == (template is RSA_2048)
    assert usage.value.key_agreement == (template is not RSA_2048)
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca) == (True, False)
    purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [purpose.dotted_string for purpose in purposes] == ["2.23.133.8.1"]
    (name,) = extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DirectoryName
    )
    assert [(attribute.oid.dotted_string, attribute.value) for attribute in name] == [
        ("2.23.133.2.1", "id:49424D00"),
        ("2.23.133.2.2", "spvtpm"),
        ("2.23.133.2.3", "id:20191023"),
    ]
    attributes = extensions.get_extension_for_oid(x509.ObjectIdentifier("2.5.29.9")).value
    assert isinstance(attributes, x509.UnrecognizedExtension)
    assert attributes.value.hex() == "3019301706056781050210310e300c0c03322e30020100020200a4"
    authority = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    chip = papers().chip.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert authority.key_identifier == chip.digest, "of the issuer's key, not of the EK"


def test_it_is_valid_as_long_as_the_chips_own() -> None:
    """The host sets the clock: it has no say in when a certificate begins or ends."""
    ek, chip = new_certificate(papers()).certificate, papers().chip.certificate
    assert ek.not_valid_before_utc == chip.not_valid_before_utc
    assert ek.not_valid_after_utc == chip.not_valid_after_utc


USAGE = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
WRONG_EXTENSIONS: dict[str, Extensions] = {
    "a CA": [(x509.BasicConstraints(ca=True, path_length=0), True)],
    "another usage": [(USAGE, True)],
    "usage not critical": [(x509.KeyUsage(False, False, False, False, True, False, False, False, False), False)],
    "another purpose": [(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)],
    "one more purpose": [(x509.ExtendedKeyUsage([EK_PURPOSE, ExtendedKeyUsageOID.CLIENT_AUTH]), False)],
    "one more extension": [(x509.OCSPNoCheck(), False)],
    "no manufacturer": [(x509.SubjectAlternativeName([x509.DNSName("vtpm.example")]), False)],
    "another key's identifier": [(x509.SubjectKeyIdentifier(bytes(20)), False)],
    "issuer's key not named": [(x509.AuthorityKeyIdentifier(None, [x509.DNSName("x.example")], 1), False)],
    "no specification": [(x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.9"), b"0\0"), False)],
    "a vast revision": [
        (
            x509.UnrecognizedExtension(
                x509.ObjectIdentifier("2.5.29.9"), b"\x0c\x032.0\x02\x01\x00\x02\x7f" + b"1" * 300
            ),
            False,
        )
    ],
}


@pytest.mark.parametrize("extensions", WRONG_EXTENSIONS.values(), ids=WRONG_EXTENSIONS)
def test_other_extensions_are_refused_whoever_signed_them(extensions: Extensions) -> None:
    genuine = new_certificate(papers()).encode()
    der = forged(genuine, papers().chip.key, extensions=extensions)
    with pytest.raises(CertificateError, match="the EK certificate"):
        parse_ek_certificate(der)


@pytest.mark.parametrize(
    "oid", [extension.oid for extension in new_certificate(papers()).certificate.extensions], ids=str
)
def test_none_of_the_extensions_may_be_missing(oid: x509.ObjectIdentifier) -> None:
    der = forged(new_certificate(papers()).encode(), papers().chip.key, without=[oid])
    with pytest.raises(CertificateError):
        parse_ek_certificate(der)


@pytest.mark.parametrize(
    "text", ["", "6F1C52CE-34D5-4B6C-8D8F-6C0F3F0E9A11", "urn:uuid:6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11", "x"]
)
def test_the_vtpm_is_named_in_one_way(text: str) -> None:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, "vTPM endorsement key")]
    parts += [x509.NameAttribute(NameOID.SERIAL_NUMBER, text)] if text else []
    der = forged(new_certificate(papers()).encode(), papers().chip.key, subject=x509.Name(parts))
    with pytest.raises(CertificateError, match="name a vTPM"):
        parse_ek_certificate(der)


def test_a_key_of_no_template_is_refused() -> None:
    genuine = new_certificate(papers()).encode()
    for key in (
        ec.generate_private_key(ec.SECP521R1()).public_key(),
        rsa.generate_private_key(65537, 3072).public_key(),
        rsa.generate_private_key(3, 2048).public_key(),
    ):
        with pytest.raises(CertificateError, match="no standard EK template"):
            parse_ek_certificate(forged(genuine, papers().chip.key, key=key))


def test_another_signature_algorithm_is_refused() -> None:
    der = forged(new_certificate(papers()).encode(), papers().chip.key, algorithm=SHA256())
    with pytest.raises(CertificateError, match="ECDSA and SHA-384"):
        parse_ek_certificate(der)


def test_no_flipped_bit_is_accepted() -> None:
    genuine, chain = new_certificate(papers()).encode(), parse_chain(papers().chip_chain)
    for offset in range(len(genuine)):
        altered = bytearray(genuine)
        altered[offset] ^= 1 << offset % 8
        with pytest.raises(SpvtpmError):
            verify_endorsed(parse_ek_certificate(bytes(altered)), chain, VTPM)


@pytest.mark.parametrize("content", [b"", b"\0", b"0\x82\xff\xff", bytes(MAX_CERTIFICATE_BYTES + 1)])
def test_what_is_no_certificate_is_refused(content: bytes) -> None:
    with pytest.raises(CertificateError):
        parse_ek_certificate(content)


def test_another_chips_certificate_is_refused() -> None:
    foreign = new_papers("Other Silicon")
    ek = new_certificate(foreign)
    with pytest.raises(UntrustedIssuer):
        verify_endorsed(ek, parse_chain(papers().chip_chain), VTPM)
    with pytest.raises(UntrustedIssuer):
        verify_endorsement(new_endorsement(foreign), VTPM, papers().genuine(Purpose.CHIP))


def test_a_certificate_by_the_wrong_key_of_the_right_name_is_refused() -> None:
    der = forged(new_certificate(papers()).encode(), ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(UntrustedIssuer, match="not signed"):
        verify_endorsed(parse_ek_certificate(der), parse_chain(papers().chip_chain), VTPM)


def test_another_vtpms_certificate_is_refused() -> None:
    policy, chain = papers().genuine(Purpose.CHIP), parse_chain(papers().chip_chain)
    verify_endorsed(new_certificate(papers(), vtpm_id=OTHER_VTPM), chain, OTHER_VTPM)
    with pytest.raises(UntrustedIssuer, match=str(OTHER_VTPM)):
        verify_endorsed(new_certificate(papers(), vtpm_id=OTHER_VTPM), chain, VTPM)
    assert len(verify_endorsement(new_endorsement(papers()), VTPM, policy)) == len(EK_TEMPLATES)
    with pytest.raises(UntrustedIssuer):
        verify_endorsement(new_endorsement(papers(), OTHER_VTPM), VTPM, policy)


@templates
def test_another_key_than_the_certified_one_is_refused(template: EkTemplate) -> None:
    ek = new_certificate(papers(), template)
    with pytest.raises(UntrustedIssuer, match="not the"):
        verify_public(ek, new_public(template))
    usable = bytearray(ek.public)
    usable[7] ^= 0x40  # the same key, but usable with a password
    with pytest.raises(UntrustedIssuer, match="not the"):
        verify_public(ek, bytes(usable))


@templates
def test_a_public_area_that_is_not_the_templates_is_never_certified(template: EkTemplate) -> None:
    public = new_public(template)
    for altered in (public[:-1], public + b"\0", b"", *(_flipped(public, at) for at in range(len(template.fixed) + 2))):
        with pytest.raises(CertificateError):
            build_ek_certificate(papers().chip, template, altered, VTPM, MAKE)


def test_a_point_that_is_not_on_the_curve_is_never_certified() -> None:
    for template in (ECC_P256, ECC_P384):
        public = template.encode_public(*(b"\x01" * size for size in template.parts))
        with pytest.raises(CertificateError, match="holds no key"):
            build_ek_certificate(papers().chip, template, public, VTPM, MAKE)


def _flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


@templates
def test_openssl_agrees_with_the_chain_and_refuses_another(template: EkTemplate, tmp_path: Path) -> None:
    def write(name: str, *certificates: bytes) -> Path:
        path = tmp_path / name
        for der in certificates:
            done = subprocess.run(["openssl", "x509", "-inform", "der"], input=der, capture_output=True, check=True)
            with path.open("ab") as file:
                file.write(done.stdout)
        return path

    def verify(leaf: Path, chain: tuple[bytes, ...]) -> bool:
        root, between = write(f"root-{leaf.name}", chain[2]), write(f"between-{leaf.name}", *chain[:2])
        command: list[str | Path] = [
            "openssl",
            "verify",
            "-x509_strict",
            "-attime",
            "1803902400",
            "-CAfile",
            root,
            "-untrusted",
            between,
            leaf,
        ]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    ek = new_certificate(papers(), template).encode()
    assert verify(write("ek.pem", ek), papers().chip_chain)
    assert not verify(write("foreign.pem", new_certificate(new_papers(), template).encode()), papers().chip_chain)


def test_an_endorsement_is_read_within_its_bounds() -> None:
    endorsement = new_endorsement(papers())
    assert parse_endorsement(encode_endorsement(endorsement)) == endorsement
    certificate = b"\x30"
    for wrong in (
        VtpmEndorsement(certificates=(certificate,) * 9, issuer=(certificate,) * 3),
        VtpmEndorsement(certificates=(bytes(2049),), issuer=(certificate,) * 3),
        VtpmEndorsement(certificates=(), issuer=(certificate, b"", certificate)),
    ):
        with pytest.raises(MessageError):
            parse_endorsement(encode_endorsement(wrong))
    with pytest.raises(MessageError):
        parse_endorsement(b"\xc1")
