"""Whether a chain shows what it has to: small policies, each with `verify(chain) -> None`, which raises or agrees. Pure.

`genuine` gives the ones that nobody may leave out; `AllOf` adds those that the reader wants besides.

Why not `cryptography.x509.verification`: tried, it can walk these chains, but only as those of a TLS client, with its rules for
leaves switched off (a chip's own chain ends in a CA, and no leaf here has a subject alternative name), so that ours would be
needed all the same. It knows no revocation lists, tells all failures alike, and its interface is not promised to stay. Our
chain has one shape and no alternatives to search among, which leaves few checks: `parse_chain` has done those of RFC 5280,
section 6.1, that one certificate answers alone (basic constraints, path length, key usage, extensions, each as profiled for
its place); `TrustedRoots` and `ValidAt` do those that take the next certificate, or the time. The tests hold ours against that
library and against OpenSSL.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from itertools import pairwise
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.wire.certificate_extensions import Features
from spvtpm.wire.certificates import CHANNEL, CHIP, INTERMEDIATE, ROOT, Chain
from spvtpm.wire.errors import (
    CertificateExpired,
    CertificateRefused,
    ChipNotAllowed,
    FirmwareTooOld,
    UntrustedIssuer,
)
from spvtpm.wire.revocation import RevocationList

_NAMES = (ROOT.name, INTERMEDIATE.name, CHIP.name, CHANNEL.name)  # from the root on


class ChainPolicy(Protocol):
    """One thing that a chain has to show."""

    def verify(self, chain: Chain) -> None:
        """Returns if the chain shows it.

        Raises:
            CertificateRefused: it does not; the class says in which way.
        """


class Purpose(Enum):
    """What a chain is shown for: the value is how many certificates it then has."""

    CHIP = 3
    CHANNEL = 4


@dataclass(frozen=True, slots=True)
class TrustedRoots:
    """The chain ends in one of these roots, and each certificate in it is signed by the next."""

    roots: Sequence[x509.Certificate]

    def verify(self, chain: Chain) -> None:
        if chain.encode()[-1] not in [root.public_bytes(Encoding.DER) for root in self.roots]:
            raise UntrustedIssuer("the chain ends in a vendor's root that is not trusted here")
        from_root = pairwise(reversed(chain.certificates))
        for (issuer, certificate), name in zip(from_root, _NAMES[1:], strict=False):
            verify_issued_by(certificate, issuer, name)


@dataclass(frozen=True, slots=True)
class ValidAt:
    """Every certificate of the chain is valid at this time, which has a time zone."""

    time: datetime

    def verify(self, chain: Chain) -> None:
        for certificate, name in zip(reversed(chain.certificates), _NAMES, strict=False):
            if self.time < certificate.not_valid_before_utc:
                raise CertificateExpired(f"the {name} is not valid before {certificate.not_valid_before_utc}")
            if self.time > certificate.not_valid_after_utc:
                raise CertificateExpired(f"the {name} is not valid after {certificate.not_valid_after_utc}")


@dataclass(frozen=True, slots=True)
class ShownFor:
    """The chain's leaf is of this kind: a chip's own certificate is no channel certificate, nor the reverse."""

    purpose: Purpose

    def verify(self, chain: Chain) -> None:
        if len(chain.certificates) != self.purpose.value:
            wanted = self.purpose.name.lower()
            raise CertificateRefused(
                f"the chain ends in a {_NAMES[len(chain.certificates) - 1]}, not in a {wanted} certificate"
            )


@dataclass(frozen=True, slots=True)
class HasFeatures:
    """The chip has all these features, and so has its firmware where the chain tells."""

    required: Features

    def verify(self, chain: Chain) -> None:
        given = chain.chip.features if chain.channel is None else chain.channel.features  # which the chip's include
        missing = Features(int(self.required) & ~int(given))
        if missing:
            names = [str(feature.name).lower() for feature in Features if feature & missing] or [f"{int(missing):#x}"]
            raise ChipNotAllowed(f"the chip or its firmware lacks: {', '.join(names)}")


@dataclass(frozen=True, slots=True)
class OfFleet:
    """The chip belongs to this fleet, 16 bytes."""

    fleet_id: bytes

    def verify(self, chain: Chain) -> None:
        if chain.chip.fleet_id != self.fleet_id:
            raise ChipNotAllowed(f"the chip is of the fleet {chain.chip.fleet_id.hex()}, not {self.fleet_id.hex()}")


@dataclass(frozen=True, slots=True)
class AllowedChips:
    """The chip is one of these, 16 bytes each."""

    chip_ids: Collection[bytes]

    def verify(self, chain: Chain) -> None:
        if chain.chip.chip_id not in self.chip_ids:
            raise ChipNotAllowed(f"the chip {chain.chip.chip_id.hex()} is not among those that are allowed")


@dataclass(frozen=True, slots=True)
class MinimumFirmware:
    """The chip runs this version of the firmware or a newer one. Only a channel certificate tells."""

    version: int

    def verify(self, chain: Chain) -> None:
        if chain.channel is None:
            raise CertificateRefused("a chip certificate does not tell which firmware runs")
        if chain.channel.firmware < self.version:
            raise FirmwareTooOld(f"the firmware has version {chain.channel.firmware}; needed: {self.version}")


@dataclass(frozen=True, slots=True)
class NotRevoked:
    """The vendor's current list does not hold the chip.

    Attributes:
        revoked: the list, of the intermediate that issued the chip's certificate.
        time: at which it must be current, with a time zone.
        min_number: of the newest list that the reader has seen; an older one is refused.
    """

    revoked: RevocationList
    time: datetime
    min_number: int = 1

    def verify(self, chain: Chain) -> None:
        self.revoked.verify(chain.chip_certificate, chain.intermediate, self.time, self.min_number)


@dataclass(frozen=True, slots=True)
class AllOf:
    """All of these; the first that does not agree is told."""

    policies: Sequence[ChainPolicy]

    def verify(self, chain: Chain) -> None:
        for policy in self.policies:
            policy.verify(chain)


def genuine(
    purpose: Purpose, roots: Sequence[x509.Certificate], revoked: RevocationList, time: datetime, min_number: int = 1
) -> AllOf:
    """What every reader must ask of every chain: the kind, the vendor, the time, and that the chip is not revoked.

    Args:
        purpose: what the chain is shown for.
        roots: the vendors' root certificates that the reader trusts, from `parse_certificate`.
        revoked: the vendor's newest list.
        time: now, with a time zone.
        min_number: of the newest list that the reader has seen.
    """
    return AllOf([ShownFor(purpose), TrustedRoots(roots), ValidAt(time), NotRevoked(revoked, time, min_number)])


def verify_issued_by(certificate: x509.Certificate, issuer: x509.Certificate, name: str) -> None:
    """Whether `issuer` signed `certificate`: names, key identifiers, signature. Whether it may is its profile's matter.

    Args:
        certificate: as profiled.
        issuer: as profiled.
        name: of the certificate, for the sentence.

    Raises:
        UntrustedIssuer: it did not.
    """
    if certificate.issuer != issuer.subject:
        raise UntrustedIssuer(f"the {name} names another issuer than the next certificate in the chain")
    authority = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    if authority.key_identifier != own.digest:
        raise UntrustedIssuer(f"the {name} names another issuer's key than that of the next certificate in the chain")
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        raise UntrustedIssuer(f"the {name} is not signed by the next certificate in the chain") from None
