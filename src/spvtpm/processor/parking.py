"""The state of a parked vTPM: sealed in the SP's memory, good for one waking.

In memory only, on purpose: an SP that goes down is a power cut for its vTPMs. A parked state on disk could be put back
later and undo PCR extensions.
"""

from __future__ import annotations

import os
import uuid

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from spvtpm.processor.worker.messages import Parked, encode, parse_from_worker
from spvtpm.wire.errors import IntegrityError, MessageError

_NONCE_BYTES = 12


class ParkingLot:
    """Keeps parked states, each under a key that is made when it comes and thrown away when it goes."""

    def __init__(self) -> None:
        self._kept: dict[uuid.UUID, tuple[bytes, bytes]] = {}

    def __contains__(self, vtpm_id: uuid.UUID) -> bool:
        return vtpm_id in self._kept

    def put(self, vtpm_id: uuid.UUID, state: Parked) -> None:
        """Takes a state; an older one of the same vTPM is gone."""
        key = AESGCM.generate_key(256)
        nonce = os.urandom(_NONCE_BYTES)
        self._kept[vtpm_id] = key, nonce + AESGCM(key).encrypt(nonce, encode(state), vtpm_id.bytes)

    def take(self, vtpm_id: uuid.UUID) -> Parked:
        """Gives the state back, once.

        Raises:
            KeyError: none is kept.
            IntegrityError: the memory was altered.
        """
        key, sealed = self._kept.pop(vtpm_id)
        try:
            plain = AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], vtpm_id.bytes)
            state = parse_from_worker(plain)
        except (InvalidTag, MessageError):
            raise IntegrityError(f"the parked state of vTPM {vtpm_id} is altered") from None
        if not isinstance(state, Parked):
            raise IntegrityError(f"the parked state of vTPM {vtpm_id} is none")
        return state

    def drop(self, vtpm_id: uuid.UUID) -> None:
        """Forgets a state, if there is one."""
        self._kept.pop(vtpm_id, None)
