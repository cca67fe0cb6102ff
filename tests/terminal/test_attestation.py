"""What the terminal asks of a chain, and what a person then reads. The chains' own checks: tests/wire/test_certificates.py."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from spvtpm.terminal.attestation import Demands, Verified, verify_endorsement, verify_secure_processor
from spvtpm.terminal.keyring import list_issuer
from spvtpm.vendor.factory import ALL_FEATURES, make_chip
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
from tests.papers import DAY, NOW, channel_chain, new_papers, papers, todays_papers
from tests.terminal.estate import Estate

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


@pytest.mark.attack("A20")
@pytest.mark.claim("C7")
def test_ek_certificates_are_those_of_this_vtpm_by_a_genuine_chip(estate: Estate) -> None:
    first, second = estate.stopped_vm(), estate.stopped_vm()
    found, chip = estate.desk().endorsement(first)
    other, _chip = estate.desk().endorsement(second)
    fake = new_papers().chip_chain
    trust = Demands([todays_papers().root.certificate], estate.keyring.revocation_lists())
    vtpm_id, now = estate.vtpm_of(first), datetime.now(UTC)

    assert (found.vtpm_id, len(found.certificates) >= 2, chip.firmware) == (vtpm_id, True, None)
    assert chip.chip_id.hex() in estate.sps[0].log()
    verify_endorsement(found, vtpm_id, trust, now)
    with pytest.raises(UntrustedIssuer, match="is one of the vTPM"):
        verify_endorsement(replace(other, vtpm_id=vtpm_id), vtpm_id, trust, now)
    with pytest.raises(UntrustedIssuer, match="root that is not trusted"):
        verify_endorsement(replace(found, issuer=(fake[0], fake[1], fake[2])), vtpm_id, trust, now)
    with pytest.raises(UntrustedIssuer):
        verify_endorsement(replace(found, issuer=put_another_chip()), vtpm_id, trust, now)
    with pytest.raises(CertificateError):
        verify_endorsement(replace(found, certificates=(found.certificates[0][:-1],)), vtpm_id, trust, now)


def put_another_chip() -> tuple[bytes, bytes, bytes]:
    """The chain of another chip of the same vendor."""
    return make_chip(todays_papers().vendor, "another", ALL_FEATURES, datetime.now(UTC) - DAY).certificates
