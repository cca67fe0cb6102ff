"""Whether the other side is a secure processor that its owner wants: decided before the terminal says a word of its own.

In the words of RFC 9334: the vendor is the endorser, the chip certificate his endorsement; the secure processor is the attester,
its channel certificate the evidence; the terminal is verifier and relying party at once. `Demands` is its appraisal policy,
`Verified` the attestation result. Pure.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from spvtpm.terminal.keyring import list_issuer
from spvtpm.terminal.keyring_file import ListSeen
from spvtpm.wire.certificate_extensions import Features
from spvtpm.wire.certificate_policies import (
    AllOf,
    AllowedChips,
    ChainPolicy,
    HasFeatures,
    MinimumFirmware,
    OfFleet,
    Purpose,
    TrustedRoots,
    genuine,
)
from spvtpm.wire.certificates import Chain, parse_chain
from spvtpm.wire.endorsement_certificates import verify_all_endorsed
from spvtpm.wire.errors import RevocationUnknown, UntrustedIssuer
from spvtpm.wire.messages import Endorsement
from spvtpm.wire.revocation import RevocationList

NEEDED = Features.SECURE_VIRTUALISATION | Features.VTPM


@dataclass(frozen=True, slots=True)
class Demands:
    """What the owner asks of a secure processor.

    Attributes:
        roots: of the vendors that are trusted.
        lists: the newest revocation lists at hand.
        lists_seen: number of the newest list that was seen, by key identifier of its issuer.
        chips: ids of the chips that will do, 16 bytes each; None: any genuine one.
        minimum_firmware: the oldest version that will do.
        fleet_id: 16 bytes; None: any fleet.
    """

    roots: Sequence[x509.Certificate]
    lists: Sequence[RevocationList]
    lists_seen: Mapping[bytes, int] = field(default_factory=dict)
    chips: frozenset[bytes] | None = None
    minimum_firmware: int = 0
    fleet_id: bytes | None = None

    def choices(self) -> list[ChainPolicy]:
        """What this owner asks for besides a genuine secure processor."""
        policies: list[ChainPolicy] = [HasFeatures(NEEDED), MinimumFirmware(self.minimum_firmware)]
        if self.chips is not None:
            policies.append(AllowedChips(self.chips))
        if self.fleet_id is not None:
            policies.append(OfFleet(self.fleet_id))
        return policies


@dataclass(frozen=True, slots=True)
class Verified:
    """What was verified of a chip.

    Attributes:
        chip_id: 16 bytes.
        fleet_id: 16 bytes.
        vendor: name in the trusted root.
        model: of the hardware, as the vendor says.
        firmware: version that runs, as the chip says; None where a chip's own chain does not tell.
        features: of chip and firmware.
        revoked: the list that does not hold the chip: its issuer and number.
        list_date: when that list was made.
    """

    chip_id: bytes
    fleet_id: bytes
    vendor: str
    model: str
    firmware: int | None
    features: Features
    revoked: ListSeen
    list_date: datetime

    def feature_names(self) -> list[str]:
        """The features that have a name here."""
        return [str(feature.name).lower().replace("_", " ") for feature in Features if feature & self.features]

    def __str__(self) -> str:
        firmware = "" if self.firmware is None else f", firmware {self.firmware}"
        return (
            f"chip {self.chip_id.hex()}, vendor {self.vendor}, model {self.model}{firmware}, "
            f"features {' and '.join(self.feature_names())}, "
            f"not revoked (list {self.revoked.number} of {self.list_date:%Y-%m-%d})"
        )


def verify_secure_processor(papers: Sequence[bytes], demands: Demands, now: datetime) -> Verified:
    """Whether the chain is that of a channel to a secure processor that meets the demands.

    Args:
        papers: DER, as the other side showed it; hostile bytes.
        demands: of the owner.
        now: with a time zone.

    Raises:
        CertificateError: the chain is malformed.
        CertificateRefused: it does not show what it has to show; the class says in which way.
    """
    chain = parse_chain(papers)
    revoked = _verify_genuine(chain, Purpose.CHANNEL, demands, now)
    AllOf(demands.choices()).verify(chain)
    return _result(chain, revoked)


def verify_endorsement(endorsement: Endorsement, vtpm_id: uuid.UUID, demands: Demands, now: datetime) -> Verified:
    """Whether these are the EK certificates of this vTPM, by a genuine chip; gives the chip, perhaps another than the channel's.

    Args:
        endorsement: hostile bytes.
        vtpm_id: of the vTPM that the owner means.
        demands: of the owner; what he wishes of the channel's chip does not count here.
        now: with a time zone.

    Raises:
        CertificateError: a certificate is malformed.
        CertificateRefused: the chip is not genuine, or has not certified this vTPM's keys.
    """
    chain = parse_chain(endorsement.issuer)
    revoked = _verify_genuine(chain, Purpose.CHIP, demands, now)
    verify_all_endorsed(endorsement, chain, vtpm_id)
    return _result(chain, revoked)


def to_pem(der: bytes) -> str:
    """A certificate that was verified, as OpenSSL reads it."""
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode()


def _verify_genuine(chain: Chain, purpose: Purpose, demands: Demands, now: datetime) -> RevocationList:
    if not demands.roots:
        raise UntrustedIssuer("no vendor is trusted yet; `spvtpm terminal trust ROOT.pem` says whose chips are")
    TrustedRoots(demands.roots).verify(chain)  # first, or a stranger would be told to get a revocation list
    issuer = x509.SubjectKeyIdentifier.from_public_key(chain.intermediate.public_key()).digest
    revoked = next((candidate for candidate in demands.lists if list_issuer(candidate) == issuer), None)
    if revoked is None:
        raise RevocationUnknown("there is no revocation list of this chip's vendor here")
    genuine(purpose, demands.roots, revoked, now, demands.lists_seen.get(issuer, 1)).verify(chain)
    return revoked


def _result(chain: Chain, revoked: RevocationList) -> Verified:
    names = chain.root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return Verified(
        chip_id=chain.chip.chip_id,
        fleet_id=chain.chip.fleet_id,
        vendor=str(names[0].value) if names else chain.root.subject.rfc4514_string(),
        model=chain.chip.model,
        firmware=None if chain.channel is None else chain.channel.firmware,
        features=chain.chip.features if chain.channel is None else chain.channel.features,
        revoked=ListSeen(list_issuer(revoked), revoked.number),
        list_date=revoked.crl.last_update_utc,
    )
