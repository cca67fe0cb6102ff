"""The attestation key (AK) that a verifier has a TPM make: a restricted signing key that never leaves it. Pure, hostile bytes.

Restricted: it signs nothing that begins like an attestation but what the TPM itself has attested. Fixed, and derived from a seed
that never leaves the TPM: nobody has it elsewhere.

Source: TCG TPM 2.0 Library Part 1, section "Attestation Identity Keys"; Part 2, sections "TPMT_PUBLIC", "TPMA_OBJECT".
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from spvtpm.wire.errors import MessageError
from spvtpm.wire.platform_errors import EvidenceRefused
from spvtpm.wire.tpm_structures import Reader, sized

_ECC, _SHA256, _NULL, _ECDSA, _P256 = 0x0023, 0x000B, 0x0010, 0x0018, 0x0003
"""Source: as above, Part 2, tables TPM_ALG_ID and TPM_ECC_CURVE."""

_ATTRIBUTES: Final = 0x00050472
"""fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, sign."""

_FIXED: Final = struct.pack(">HHIH5H", _ECC, _SHA256, _ATTRIBUTES, 0, _NULL, _ECDSA, _SHA256, _P256, _NULL)
"""TPMT_PUBLIC up to `unique`: no policy, no symmetric algorithm, ECDSA with SHA-256, P-256, no KDF."""

COORDINATE_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class AttestationKey:
    """An AK, exactly of the template. Whose it is, activating a credential has to show.

    Attributes:
        public: TPMT_PUBLIC.
        key: the same, to verify with.
    """

    public: bytes
    key: ec.EllipticCurvePublicKey

    @property
    def name(self) -> bytes:
        """As a TPM names it. Source: as above, Part 1, section "Names"."""
        return _SHA256.to_bytes(2, "big") + hashlib.sha256(self.public).digest()

    def qualified_name(self, hierarchy: int) -> bytes:
        """As of a primary key of this hierarchy (TPM_RH). Source: as above, Part 1, section "Qualified Name"."""
        return _SHA256.to_bytes(2, "big") + hashlib.sha256(hierarchy.to_bytes(4, "big") + self.name).digest()

    def verify(self, signature: bytes, attested: bytes) -> None:
        """Whether the AK has signed it.

        Args:
            signature: TPMT_SIGNATURE; hostile bytes.
            attested: the bytes that were signed, TPMS_ATTEST.

        Raises:
            MessageError: it is no such signature.
            EvidenceRefused: it is not the AK's, of these bytes.
        """
        try:
            self.key.verify(_parse_signature(signature), attested, ec.ECDSA(SHA256()))
        except InvalidSignature:
            raise EvidenceRefused("the quote is not signed by the attestation key") from None


def ak_template(unique: bytes) -> bytes:
    """The TPMT_PUBLIC that TPM2_CreatePrimary takes.

    Args:
        unique: 32 bytes; another AK for each.
    """
    return _FIXED + sized(unique) + sized(bytes(COORDINATE_BYTES))


def parse_ak(public: bytes) -> AttestationKey:
    """An AK, from its public area; hostile bytes.

    Raises:
        EvidenceRefused: it is a key of another kind, which may be elsewhere too, or sign what no TPM attests.
    """
    reader = Reader(public, "the attestation key")
    try:
        fixed = reader.take(len(_FIXED))
        x, y = (reader.sized(COORDINATE_BYTES) for _ in range(2))
        reader.finish()
        point = (int.from_bytes(x, "big"), int.from_bytes(y, "big"))
        key = ec.EllipticCurvePublicNumbers(*point, ec.SECP256R1()).public_key()
    except (MessageError, ValueError):
        raise EvidenceRefused("the VM shows an attestation key that is none") from None
    if fixed != _FIXED:
        raise EvidenceRefused("the VM shows an attestation key of another kind than was asked for")
    return AttestationKey(public, key)


def _parse_signature(signature: bytes) -> bytes:
    """A TPMT_SIGNATURE as DER. Source: as above, Part 2, sections "TPMT_SIGNATURE", "TPMS_SIGNATURE_ECDSA"."""
    reader = Reader(signature, "the quote's signature")
    if (reader.number("H"), reader.number("H")) != (_ECDSA, _SHA256):
        raise MessageError("the quote's signature is of another kind than was asked for")
    r, s = (int.from_bytes(reader.sized(COORDINATE_BYTES), "big") for _ in range(2))
    reader.finish()
    return encode_dss_signature(r, s)
