"""The standard endorsement keys (EKs) of a vTPM: which keys a TPM derives from its endorsement seed, and where it certifies them.

A public area of such a key is the template's with the key in place of the template's `unique`; anything else is refused.

Source: TCG EK Credential Profile for TPM Family 2.0 (2.5), sections 2.2.1.4 (NV indices), B.3 (low range) and B.4 (high range).
TPMT_PUBLIC: TCG TPM 2.0 Library Part 2, section "TPMT_PUBLIC".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from spvtpm.wire.errors import CertificateError

CHAIN_INDEX: Final = 0x01C00100
"""Where the issuers' certificates begin. Source: as above, section 2.2.1.5.4, EK certificate chains."""

CHAIN_INDICES: Final = 0x100

_RSA, _ECC, _SHA256, _SHA384, _NULL = 0x0001, 0x0023, 0x000B, 0x000C, 0x0010
_AES, _CFB, _P256, _P384 = 0x0006, 0x0043, 0x0003, 0x0004
"""Source: TCG TPM 2.0 Library Part 2, tables TPM_ALG_ID and TPM_ECC_CURVE."""

_LOW_ATTRIBUTES, _HIGH_ATTRIBUTES = 0x000300B2, 0x000300F2
"""fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt; in the high range userWithAuth too."""

_POLICY_A = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret(TPM_RH_ENDORSEMENT), SHA-256. Source: as above, table "PolicyA"."""

_POLICY_B = bytes.fromhex(
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
)
"""That, or what NV index 0x01C07F02 holds, SHA-384. Source: as above, table "PolicyB"."""


def _sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


@dataclass(frozen=True, slots=True)
class EkTemplate:
    """One standard EK.

    Attributes:
        name: as sentences call it.
        nv_index: of its certificate.
        fixed: the public area up to `unique`.
        unique: of the template.
        parts: sizes in bytes of what a key has in `unique`'s place: the modulus, or both coordinates.
    """

    name: str
    nv_index: int
    fixed: bytes
    unique: bytes
    parts: tuple[int, ...]

    @property
    def public(self) -> bytes:
        """The TPMT_PUBLIC that TPM2_CreatePrimary takes."""
        return self.fixed + self.unique

    def parse_public(self, public: bytes) -> tuple[bytes, ...]:
        """What is the key's own in a public area of this template: the modulus, or both coordinates.

        Args:
            public: a TPMT_PUBLIC; hostile bytes.

        Raises:
            CertificateError: it is none of this template.
        """
        if public[: len(self.fixed)] == self.fixed:
            unique, parts = public[len(self.fixed) :], []
            for size in self.parts:
                parts.append(unique[2 : 2 + size])
                unique = unique[2 + size :]
            if self.encode_public(*parts) == public:
                return tuple(parts)
        raise CertificateError(f"a public area is not one of the {self.name}'s template")

    def encode_public(self, *parts: bytes) -> bytes:
        """The public area of a key, from what is its own."""
        if tuple(map(len, parts)) != self.parts:
            raise CertificateError(f"a key has not the size of the {self.name}'s template")
        return self.fixed + b"".join(map(_sized, parts))


def _fixed(kind: int, hash_id: int, attributes: int, policy: bytes, aes_bits: int, details: bytes) -> bytes:
    symmetric = struct.pack(">HHH", _AES, aes_bits, _CFB)
    return (
        struct.pack(">HHI", kind, hash_id, attributes) + _sized(policy) + symmetric + struct.pack(">H", _NULL) + details
    )


RSA_2048: Final = EkTemplate(
    "RSA-2048 EK",
    0x01C00002,
    _fixed(_RSA, _SHA256, _LOW_ATTRIBUTES, _POLICY_A, 128, struct.pack(">HI", 2048, 0)),
    _sized(bytes(256)),
    (256,),
)
ECC_P256: Final = EkTemplate(
    "P-256 EK",
    0x01C0000A,
    _fixed(_ECC, _SHA256, _LOW_ATTRIBUTES, _POLICY_A, 128, struct.pack(">HH", _P256, _NULL)),
    _sized(bytes(32)) * 2,
    (32, 32),
)
ECC_P384: Final = EkTemplate(
    "P-384 EK",
    0x01C00016,
    _fixed(_ECC, _SHA384, _HIGH_ATTRIBUTES, _POLICY_B, 256, struct.pack(">HH", _P384, _NULL)),
    _sized(b"") * 2,
    (48, 48),
)
EK_TEMPLATES: Final = (RSA_2048, ECC_P256, ECC_P384)
"""Those that every vTPM has, in the order in which their certificates are kept."""
