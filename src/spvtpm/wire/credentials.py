"""A credential: a secret that a TPM gives out only if it has both the endorsement key and the key that is named. For verifiers.

What TPM2_MakeCredential does, without a TPM. Only the specified format is assembled here; all cryptography is the library's.

Source: TCG TPM 2.0 Library Part 1, section 24 "Credential Protection", section 11.4.10 "Key Derivation Function", annex C.6.1
"ECDH"; Part 2, sections "TPM2B_ID_OBJECT", "TPM2B_ENCRYPTED_SECRET".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from spvtpm.wire.tpm_structures import sized

SECRET_BYTES: Final = 32
"""The longest that the name algorithm of the EK allows."""

_COORDINATE_BYTES, _SEED_BYTES, _AES_BYTES, _BLOCK_BYTES = 32, 32, 16, 16
"""Those of the P-256 EK: SHA-256, AES-128."""


@dataclass(frozen=True, slots=True)
class Credential:
    """What TPM2_ActivateCredential takes.

    Attributes:
        blob: TPM2B_ID_OBJECT.
        secret: TPM2B_ENCRYPTED_SECRET: the seed, which the EK alone finds.
    """

    blob: bytes
    secret: bytes


def make_credential(ek: ec.EllipticCurvePublicKey, name: bytes, secret: bytes) -> Credential:
    """A credential that only a TPM with both keys opens.

    Args:
        ek: a P-256 EK, whose certificate was verified.
        name: of the key that has to be in the same TPM.
        secret: what the TPM gives out; 1 to 32 bytes.
    """
    ephemeral = ec.generate_private_key(ek.curve)
    ours, theirs = _coordinates(ephemeral.public_key()), _coordinates(ek)
    parties = b"IDENTITY\0" + ours[0] + theirs[0]
    seed = ConcatKDFHash(SHA256(), _SEED_BYTES, parties).derive(ephemeral.exchange(ec.ECDH(), ek))  # KDFe
    encryptor = Cipher(AES(_kdfa(seed, b"STORAGE", name, _AES_BYTES)), CFB(bytes(_BLOCK_BYTES))).encryptor()
    identity = encryptor.update(sized(secret)) + encryptor.finalize()
    integrity = HMAC(_kdfa(seed, b"INTEGRITY", b"", SHA256.digest_size), SHA256())
    integrity.update(identity + name)
    return Credential(sized(sized(integrity.finalize()) + identity), sized(sized(ours[0]) + sized(ours[1])))


def _kdfa(key: bytes, label: bytes, context: bytes, size_bytes: int) -> bytes:
    """KDFa: the counter mode of NIST SP 800-108 with HMAC; counter and length in bits have 32 bits."""
    return KBKDFHMAC(
        SHA256(), Mode.CounterMode, size_bytes, 4, 4, CounterLocation.BeforeFixed, label, context, None
    ).derive(key)


def _coordinates(key: ec.EllipticCurvePublicKey) -> tuple[bytes, bytes]:
    numbers = key.public_numbers()
    return numbers.x.to_bytes(_COORDINATE_BYTES, "big"), numbers.y.to_bytes(_COORDINATE_BYTES, "big")
