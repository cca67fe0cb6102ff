"""Who the SP is on its confidential channel: a key made at its start, certified by the chip EK with what runs here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.processor.fuses import Fuses
from spvtpm.wire.certificate_building import Validity, build_channel_certificate
from spvtpm.wire.certificate_extensions import ChannelIdentity, Features
from spvtpm.wire.certificates import LONGEST_CHANNEL_VALIDITY, parse_chain

FIRMWARE_VERSION = 1
"""Of the trusted part of this program; grows whenever owners have a reason to refuse what was before."""

_FEATURES = Features.SECURE_VIRTUALISATION | Features.VTPM
_CLOCKS_APART = timedelta(hours=1)
"""How far the clock of whoever reads the certificate may go after ours."""

_RENEWAL = LONGEST_CHANNEL_VALIDITY / 2


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """A key and what it is certified by.

    Attributes:
        key: on P-256; in this process's memory alone.
        certificate: by the chip EK.
        chain: DER: the certificate, and the chip's up to the vendor's root.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    chain: tuple[bytes, ...]


class ChannelKeys:
    """The SP's channel key, made anew in time.

    Args:
        fuses: whose chip EK certifies.
    """

    def __init__(self, fuses: Fuses) -> None:
        self._fuses = fuses
        chip = parse_chain(fuses.certificates).chip
        features = Features(int(_FEATURES) & int(chip.features))
        self._statement = ChannelIdentity(fuses.chip_id, FIRMWARE_VERSION, features)
        self._identity = self._make(datetime.now(UTC))

    def current(self) -> Identity:
        """The key for a channel that is opened now."""
        now = datetime.now(UTC)
        left = self._identity.certificate.not_valid_after_utc - now
        if not _RENEWAL < left <= LONGEST_CHANNEL_VALIDITY:  # the clock may have been set
            self._identity = self._make(now)
        return self._identity

    def _make(self, now: datetime) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        validity = Validity.lasting(now - _CLOCKS_APART, LONGEST_CHANNEL_VALIDITY)
        certificate = build_channel_certificate(self._fuses.endorsement, key.public_key(), self._statement, validity)
        return Identity(key, certificate, (certificate.public_bytes(Encoding.DER), *self._fuses.certificates))
