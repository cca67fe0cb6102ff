"""A01: a secure processor that is none. A naive reader accepts each of these chains; ours refuses it.

The naive readers here are ones that people write: is the leaf signed by the certificate that came along with it; does its subject
name the chip that I expect.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from spvtpm.vendor.factory import ALL_FEATURES, make_chip
from spvtpm.wire.certificate_building import Validity
from spvtpm.wire.certificate_extensions import CHIP_IDENTITY, ChipIdentity, Features
from spvtpm.wire.certificate_policies import AllOf, HasFeatures, NotRevoked, Purpose
from spvtpm.wire.certificates import parse_chain
from spvtpm.wire.errors import (
    CertificateError,
    CertificateExpired,
    CertificateRefused,
    CertificateRevoked,
    ChipNotAllowed,
    SpvtpmError,
    UntrustedIssuer,
)
from tests.papers import DAY, NOW, channel_chain, forged, new_papers, papers

pytestmark = pytest.mark.attack("A01")
Chain = tuple[bytes, ...]


def naive_signature(chain: Chain) -> None:
    """The leaf is signed by the certificate that came along with it."""
    leaf, issuer = map(x509.load_der_x509_certificate, chain[:2])
    leaf.verify_directly_issued_by(issuer)


def naive_subject(chain: Chain) -> None:
    """The leaf's subject names the chip that is expected."""
    subject = x509.load_der_x509_certificate(chain[0]).subject
    assert subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)[0].value == papers().made.chip_id.hex()


def refused(
    chain: Chain, naive: Callable[[Chain], None], kind: type[SpvtpmError], sentence: str, policy: AllOf | None = None
) -> None:
    """The naive reader takes it, ours does not, and says why."""
    naive(chain)
    with pytest.raises(kind, match=sentence):
        (policy or papers().genuine()).verify(parse_chain(chain))


def test_the_genuine_chain_is_accepted_by_all() -> None:
    naive_signature(papers().channel)
    naive_subject(papers().channel)
    papers().genuine().verify(parse_chain(papers().channel))


def test_a_chip_certificate_made_by_oneself_with_the_vendors_names() -> None:
    fake = new_papers()  # the same names throughout, other keys
    assert x509.load_der_x509_certificate(fake.channel[3]).subject == papers().root.certificate.subject
    refused(fake.channel, naive_signature, UntrustedIssuer, "root that is not trusted")


def test_a_chip_certificate_made_by_oneself_under_the_genuine_intermediate() -> None:
    """All names and key identifiers are right; only the signature of the chip certificate is the forger's own."""
    genuine, key = papers(), ec.generate_private_key(ec.SECP384R1())
    chip = forged(genuine.chip_chain[0], key, key=key.public_key())
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    channel = forged(genuine.channel[0], key, extensions=[(identifier, False)])
    chain = (channel, chip, *genuine.chip_chain[1:])
    naive_subject(chain)
    refused(chain, naive_signature, UntrustedIssuer, "chip certificate is not signed by the next")


def test_another_vendors_chip() -> None:
    refused(new_papers("Another Silicon").channel, naive_signature, UntrustedIssuer, "root that is not trusted")


def test_another_vendors_chip_under_the_trusted_root() -> None:
    chain = (*new_papers("Another Silicon").channel[:3], papers().channel[3])
    refused(chain, naive_signature, UntrustedIssuer, "intermediate certificate names another issuer")


@pytest.mark.parametrize(("days", "sentence"), [(7, "not valid after"), (-7, "not valid before")])
def test_a_chain_that_has_expired_or_is_not_valid_yet(days: int, sentence: str) -> None:
    policy = papers().genuine(at=NOW + days * DAY)
    refused(papers().channel, naive_signature, CertificateExpired, sentence, policy)


def test_an_expired_chip_certificate_under_a_fresh_channel_certificate() -> None:
    genuine = papers()
    short = Validity.lasting(NOW - 300 * DAY, 200 * DAY)
    chip = forged(genuine.chip_chain[0], genuine.intermediate.key, validity=short)
    chain = (genuine.channel[0], chip, *genuine.chip_chain[1:])
    refused(chain, naive_signature, CertificateExpired, "chip certificate is not valid after")


def test_a_chip_certificate_used_as_channel_certificate() -> None:
    genuine = papers()
    refused(genuine.chip_chain, naive_subject, CertificateRefused, "not in a channel certificate")
    twice = (genuine.chip_chain[0], *genuine.chip_chain)
    refused(twice, naive_subject, CertificateError, "channel certificate has a key on the curve")


def test_a_channel_certificate_used_as_chip_certificate() -> None:
    chain = (papers().channel[0], *papers().chip_chain[1:])
    refused(chain, naive_subject, CertificateError, "chip certificate has a key on the curve")


def test_a_channel_key_that_certifies_another_channel() -> None:
    """Whoever takes a channel key out of a running secure processor cannot make certificates with it."""
    genuine, key = papers(), ec.generate_private_key(ec.SECP256R1())
    taken = forged(genuine.channel[0], genuine.chip.key, key=key.public_key())
    subject = x509.load_der_x509_certificate(taken).subject
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    made = forged(genuine.channel[0], key, issuer=subject, extensions=[(identifier, False)])
    refused((made, taken, *genuine.chip_chain[1:]), naive_signature, CertificateError, "chip certificate")
    refused((made, taken, *genuine.chip_chain), naive_signature, CertificateError, "this one has 5")


def test_a_chip_that_makes_another_chip() -> None:
    genuine, key = papers(), ec.generate_private_key(ec.SECP384R1())
    parent = x509.load_der_x509_certificate(genuine.chip_chain[0])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(genuine.chip.key.public_key())
    child = forged(
        genuine.chip_chain[0],
        genuine.chip.key,
        key=key.public_key(),
        issuer=parent.subject,
        extensions=[(identifier, False)],
    )
    chain = (child, genuine.chip_chain[0], genuine.root.certificate.public_bytes(Encoding.DER))
    refused(chain, naive_signature, CertificateError, "intermediate certificate has an extension that does not belong")


def test_a_revoked_chip() -> None:
    genuine = papers()
    revoked = genuine.revocation_list([genuine.chip.certificate.serial_number])
    policy = AllOf([genuine.genuine(), NotRevoked(revoked, NOW)])
    refused(genuine.channel, naive_signature, CertificateRevoked, "revoked this chip", policy)


def test_a_foreign_chips_channel_certificate_under_ones_own_chip() -> None:
    genuine = papers()
    other = make_chip(genuine.vendor, "test chip", ALL_FEATURES, NOW - DAY)
    chain = (genuine.channel[0], *other.certificates)
    refused(chain, naive_subject, CertificateError, "names another chip than the chip certificate")


def test_a_chip_that_speaks_in_another_chips_name() -> None:
    """A genuine chip, taken over, certifies a channel with the identity of another one."""
    genuine = papers()
    taken_over = make_chip(genuine.vendor, "test chip", ALL_FEATURES, NOW - DAY)
    own = channel_chain(taken_over)
    theirs = x509.load_der_x509_certificate(genuine.channel[0])
    identity = [
        (extension.value, False) for extension in theirs.extensions if extension.oid.dotted_string[:4] == "2.25"
    ]
    lie = forged(own[0], taken_over.issuer().key, subject=theirs.subject, extensions=identity)
    chain = (lie, *own[1:])
    naive_subject(chain)
    refused(chain, naive_signature, CertificateError, "names another chip than the chip certificate")


@pytest.mark.parametrize(
    ("extension", "sentence"),
    [
        ((x509.BasicConstraints(True, None), True), "path length None, not 0"),
        ((x509.BasicConstraints(True, 1), True), "path length 1, not 0"),
        ((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\0"), True), "a critical extension"),
        ((x509.UnrecognizedExtension(CHIP_IDENTITY, b"\x05\0"), False), "identity extension is malformed"),
    ],
)
def test_a_chip_certificate_of_the_vendors_with_wrong_extensions(
    extension: tuple[x509.ExtensionType, bool], sentence: str
) -> None:
    """Even the vendor cannot make one that is not as profiled: by mistake, or for another product."""
    genuine = papers()
    chip = forged(genuine.chip_chain[0], genuine.intermediate.key, extensions=[extension])
    chain = (genuine.channel[0], chip, *genuine.chip_chain[1:])
    refused(chain, naive_signature, CertificateError, sentence)


def test_a_genuine_chip_of_hardware_that_does_not_protect_vms() -> None:
    genuine = papers()
    plain = make_chip(genuine.vendor, "plain chip", Features.VTPM, NOW - DAY)
    policy = AllOf([genuine.genuine(), HasFeatures(ALL_FEATURES)])
    refused(channel_chain(plain, features=Features.VTPM), naive_signature, ChipNotAllowed, "secure_virt", policy)
    identity = ChipIdentity(
        plain.chip_id, plain.fleet_id, ALL_FEATURES, "plain chip"
    )  # the chip's own words are not enough
    content = x509.UnrecognizedExtension(CHIP_IDENTITY, identity.encode())
    lie = forged(plain.certificates[0], plain.issuer().key, extensions=[(content, False)])
    chain = (lie, *plain.certificates[1:])
    with pytest.raises(UntrustedIssuer, match="not signed"):
        genuine.genuine(Purpose.CHIP).verify(parse_chain(chain))
