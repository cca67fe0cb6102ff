"""Whom a vTPM may be sent to, or taken from: chips of the same vendor and fleet, not revoked, as the owner allows."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

from cryptography import x509

from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.vtpm_services import Commit
from spvtpm.wire.certificate_extensions import Features
from spvtpm.wire.certificate_policies import (
    AllowedChips,
    ChainPolicy,
    HasFeatures,
    MinimumFirmware,
    OfFleet,
    Purpose,
    genuine,
)
from spvtpm.wire.certificates import CHIP, INTERMEDIATE, ROOT, Chain, parse_certificate, parse_chain
from spvtpm.wire.errors import RevocationUnknown, SpvtpmError
from spvtpm.wire.instance_content import Policy
from spvtpm.wire.revocation import RevocationList, parse_revocation_list

log = logging.getLogger(__name__)

_RECORD = "revocations"
_FEATURES = Features.SECURE_VIRTUALISATION | Features.VTPM


class Peers:
    """Knows who is genuine. The newest list of revoked chips that was ever shown here is kept, and none older believed.

    Args:
        store: where the list is kept, for reading.
        commit: makes it durable.
        certificates: this chip's chain: chip EK, the vendor's intermediate, the vendor's root; DER.
    """

    def __init__(self, store: NvStore, commit: Commit, certificates: tuple[bytes, bytes, bytes]) -> None:
        self._commit = commit
        chip, intermediate, root = certificates
        self._own = parse_certificate(chip, CHIP)
        self._issuer = parse_certificate(intermediate, INTERMEDIATE)
        self._root: x509.Certificate = parse_certificate(root, ROOT)
        self._fleet = parse_chain(certificates).chip.fleet_id
        self._learning = asyncio.Lock()
        self._newest: RevocationList | None = None
        if _RECORD in store:
            self._newest = parse_revocation_list(store.read(_RECORD))

    @property
    def revoked(self) -> bytes:
        """The newest list that is known here, DER; empty: none is."""
        return self._newest.encode() if self._newest is not None else b""

    async def learn(self, der: bytes) -> None:
        """Takes a list that somebody has brought; one that cannot be believed, or is older than the known one, is left."""
        async with self._learning:  # or an older one, judged while a newer is being written, would come after it
            if not der or der == self.revoked:
                return
            try:
                found = parse_revocation_list(der)
                found.verify(self._own, self._issuer, datetime.now(UTC), self._least)
            except SpvtpmError as error:
                log.warning("a list of revoked chips is of no use here: %s", error)
                return
            await self._commit([(_RECORD, der)])
            self._newest = found

    @property
    def _least(self) -> int:
        return self._newest.number if self._newest is not None else 1

    def verify(self, chain_der: tuple[bytes, ...], policy: Policy | None) -> Chain:
        """Whether a peer may take part.

        Args:
            chain_der: as it has shown it; TLS has to show that it has the key.
            policy: of the VM's owner; None: it is not known yet.

        Raises:
            CertificateRefused: it may not; the class says why.
            CertificateError: it is no chain.
            RevocationUnknown: no current list is known here.
        """
        if self._newest is None:
            raise RevocationUnknown(
                "this secure processor has seen no list of revoked chips: its host has to bring one"
            )
        chain = parse_chain(chain_der)
        required: list[ChainPolicy] = [
            genuine(Purpose.CHANNEL, [self._root], self._newest, datetime.now(UTC), self._least),
            OfFleet(self._fleet),
            HasFeatures(_FEATURES),
        ]
        if policy is not None:
            required.append(MinimumFirmware(policy.minimum_firmware))
            if policy.chips is not None:
                required.append(AllowedChips(policy.chips))
        for one in required:
            one.verify(chain)
        return chain
