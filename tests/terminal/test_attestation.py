"""What the terminal asks of a chain, and what a person then reads. The chains' own checks: tests/wire/test_certificates.py."""

from __future__ import annotations

import uuid
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509 import (
    AuthorityKeyIdentifier,
    CertificateBuilder,
    Name,
    NameAttribute,
    random_serial_number,
)
from cryptography.x509.oid import NameOID

from spvtpm.terminal.attestation import Demands, Verified, verify_endorsement, verify_secure_processor
from spvtpm.terminal.keyring import list_issuer
from spvtpm.wire.certificate_building import Issuer
from spvtpm.wire.certificate_extensions import Features
from spvtpm.wire.errors import (
    CertificateError,
    CertificateExpired,
    CertificateRefused,
    CertificateRevoked,
    ChipNotAllowed,
    FirmwareTooOld,
    RevocationUnknown,
    SpvtpmError,
    UntrustedIssuer,
)
from spvtpm.wire.owner_messages import Endorsement
from tests.papers import DAY, NOW, channel_chain, der, new_papers, papers

Change = dict[str, object]


def demands(**changes: object) -> Demands:
    """What an owner who trusts this vendor asks."""
    usual: Change = {"roots": [papers().root.certificate], "lists": [papers().revocation_list(number=4)]}
    return Demands(**(usual | changes))  # type: ignore[arg-type]


def verified(**changes: object) -> Verified:
    return verify_secure_processor(papers().channel, demands(**changes), NOW)


def test_what_was_verified_is_one_sentence() -> None:
    chip = papers().made
    assert str(verified()) == (
        f"chip {chip.chip_id.hex()}, vendor Example Silicon, model test chip, firmware 7, "
        f"features secure virtualisation and vtpm, not revoked (list 4 of {NOW:%Y-%m-%d})"
    )
    assert (verified().chip_id, verified().fleet_id) == (chip.chip_id, chip.fleet_id)
    assert verified().revoked.number == 4


def test_wishes_that_are_met() -> None:
    chip = papers().made
    verified(chips=frozenset([chip.chip_id]), minimum_firmware=7, fleet_id=chip.fleet_id)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"chips": frozenset([bytes(16)])}, ChipNotAllowed),
        ({"fleet_id": bytes(16)}, ChipNotAllowed),
        ({"minimum_firmware": 8}, FirmwareTooOld),
        ({"lists": []}, RevocationUnknown),
        ({"roots": []}, UntrustedIssuer),
    ],
    ids=str,
)
def test_wishes_that_are_not_met(changes: Change, kind: type[SpvtpmError]) -> None:
    with pytest.raises(kind):
        verified(**changes)


def test_a_stranger_is_told_to_be_one_before_anything_else() -> None:
    with pytest.raises(UntrustedIssuer):
        verify_secure_processor(new_papers().channel, demands(lists=[]), NOW)


def test_a_revoked_chip() -> None:
    serial = papers().chip.certificate.serial_number
    with pytest.raises(CertificateRevoked):
        verified(lists=[papers().revocation_list([serial], number=5)])


def test_a_list_older_than_one_that_was_seen() -> None:
    listed = papers().revocation_list(number=4)
    issuer = list_issuer(listed)
    verified(lists=[listed], lists_seen={issuer: 4})
    with pytest.raises(RevocationUnknown, match="number 5 was seen"):
        verified(lists=[listed], lists_seen={issuer: 5})


def test_the_list_is_that_of_the_chips_vendor_among_several() -> None:
    other = new_papers()  # the same names, other keys
    lists = [other.revocation_list(number=9), papers().revocation_list(number=4)]
    assert verified(lists=lists).revoked.number == 4
    with pytest.raises(RevocationUnknown):
        verified(lists=lists[:1])


def test_a_list_that_ended_and_a_chain_that_ended() -> None:
    with pytest.raises(RevocationUnknown, match="ended"):
        verified(lists=[papers().revocation_list(at=NOW - 31 * DAY)])
    with pytest.raises(CertificateExpired):
        verify_secure_processor(papers().channel, demands(), NOW + timedelta(days=7))


@pytest.mark.parametrize("lacking", [Features.VTPM, Features.SECURE_VIRTUALISATION])
def test_firmware_that_lacks_a_feature(lacking: Features) -> None:
    chain = channel_chain(papers().made, features=Features(3 & ~lacking))
    with pytest.raises(ChipNotAllowed, match="lacks"):
        verify_secure_processor(chain, demands(), NOW)


def test_a_chips_own_chain_opens_no_channel() -> None:
    with pytest.raises(CertificateRefused):
        verify_secure_processor(papers().chip_chain, demands(), NOW)


# Endorsements


def ek_certificate(issuer: Issuer) -> bytes:
    """Of some key, as far as its signature is concerned."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    own = issuer.key.public_key()
    certificate = (
        CertificateBuilder()
        .serial_number(random_serial_number())
        .issuer_name(issuer.certificate.subject)
        .subject_name(Name([NameAttribute(NameOID.COMMON_NAME, "EK")]))
        .public_key(key)
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .add_extension(AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False)
        .sign(issuer.key, SHA384())
    )
    return der(certificate)


def endorsement(*certificates: bytes, issuer: tuple[bytes, ...] | None = None) -> Endorsement:
    chain = issuer or papers().chip_chain
    return Endorsement(vtpm_id=uuid.UUID(int=1), certificates=list(certificates), issuer=(chain[0], chain[1], chain[2]))


@pytest.mark.attack("A20")
def test_ek_certificates_are_those_that_a_genuine_chip_has_signed() -> None:
    good, fake = ek_certificate(papers().chip), new_papers()
    chip = verify_endorsement(endorsement(good, good), demands(), NOW)
    assert (chip.chip_id, chip.firmware) == (papers().made.chip_id, None)

    with pytest.raises(UntrustedIssuer):
        verify_endorsement(endorsement(good, ek_certificate(fake.chip)), demands(), NOW)
    with pytest.raises(UntrustedIssuer):
        verify_endorsement(endorsement(ek_certificate(fake.chip), issuer=fake.chip_chain), demands(), NOW)
    with pytest.raises(CertificateError):
        verify_endorsement(endorsement(good[:-1]), demands(), NOW)
