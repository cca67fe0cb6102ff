"""A TPM's quote: what it says, and whether it is the answer to a question. Pure, hostile bytes.

Source: TCG TPM 2.0 Library Part 2, sections "TPMS_ATTEST", "TPMS_QUOTE_INFO", "TPMS_CLOCK_INFO", "TPM_GENERATED", "TPM_ST".
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from spvtpm.wire.attestation_keys import AttestationKey
from spvtpm.wire.errors import MessageError
from spvtpm.wire.platform_errors import EvidenceRefused
from spvtpm.wire.tpm_structures import PcrSelection, Reader, read_pcr_selection

_GENERATED: Final = 0xFF544347
_QUOTE: Final = 0x8018

MAX_ATTEST_BYTES: Final = 512
"""More than any quote over all banks has: names of at most 66 bytes, 64 of nonce and of digest."""

_MAX_NAME_BYTES, _MAX_DATA_BYTES, _MAX_DIGEST_BYTES = 66, 64, 64


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote, as parsed. **Nothing in it is believed yet.**

    Attributes:
        signer: the qualified name of the key that signs it.
        nonce: what the TPM was given to put in.
        clock_ms: how long the TPM has had power in all its life.
        reset_count: how often it was reset: boots.
        restart_count: how often it was resumed since.
        safe: whether no later clock was ever shown.
        firmware: version of the TPM's firmware, 64 bits.
        selection: of which PCRs.
        digest: of their values, one after the other, SHA-256.
    """

    signer: bytes
    nonce: bytes
    clock_ms: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware: int
    selection: PcrSelection
    digest: bytes

    def verify_values(self, pcrs: Mapping[str, Mapping[int, bytes]]) -> bool:
        """Whether these values are those that were quoted."""
        return hmac.compare_digest(hashlib.sha256(self.selection.values(pcrs)).digest(), self.digest)


def parse_quote(attested: bytes) -> Quote:
    """Reads a TPMS_ATTEST.

    Raises:
        MessageError: it is malformed.
        EvidenceRefused: no TPM made it, or it is no quote.
    """
    if len(attested) > MAX_ATTEST_BYTES:
        raise MessageError(f"a quote of {len(attested)} bytes; allowed are {MAX_ATTEST_BYTES}")
    reader = Reader(attested, "the quote")
    if reader.number("I") != _GENERATED:
        raise EvidenceRefused("the quote does not begin as what a TPM attests")
    if reader.number("H") != _QUOTE:
        raise EvidenceRefused("the TPM attests something else than PCRs")
    signer, nonce = reader.sized(_MAX_NAME_BYTES), reader.sized(_MAX_DATA_BYTES)
    clock_ms, reset_count, restart_count = reader.number("Q"), reader.number("I"), reader.number("I")
    safe = reader.number("B")
    if safe > 1:
        raise MessageError("the quote has a flag that is neither set nor clear")
    firmware = reader.number("Q")
    selection, digest = read_pcr_selection(reader), reader.sized(_MAX_DIGEST_BYTES)
    reader.finish()
    return Quote(signer, nonce, clock_ms, reset_count, restart_count, safe == 1, firmware, selection, digest)


def verify_quote(
    attested: bytes, signature: bytes, ak: AttestationKey, hierarchy: int, nonce: bytes, selection: PcrSelection
) -> Quote:
    """The quote, if it answers this question and the AK has signed it.

    Args:
        attested: TPMS_ATTEST; hostile bytes.
        signature: TPMT_SIGNATURE; hostile bytes.
        ak: whose it has to be.
        hierarchy: of the AK, a primary key; TPM_RH.
        nonce: that was asked with.
        selection: that was asked for.

    Raises:
        MessageError: something is malformed.
        EvidenceRefused: it is not what has to be shown; the sentence says why.
    """
    ak.verify(signature, attested)
    quote = parse_quote(attested)
    if quote.signer != ak.qualified_name(hierarchy):
        raise EvidenceRefused("the quote names another key than the one that signed it")
    if not hmac.compare_digest(quote.nonce, nonce):
        raise EvidenceRefused("the quote is the answer to another question: its nonce is not the one just sent")
    if quote.selection != selection:
        raise EvidenceRefused("the quote is of other PCRs than were asked for")
    return quote
