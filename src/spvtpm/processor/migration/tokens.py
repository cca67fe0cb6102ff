"""The tokens of a handoff (`handoff.py`): who has a VM's `moves_key` can make them, everybody else only carry them.

    token = HKDF-SHA-256(moves key, salt = handoff id, info = "spvtpm handoff " and the token's name, 32 bytes)

Source: RFC 5869. Format: docs/formats/migration.md.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.wire.errors import WrongToken

TOKEN_BYTES = 32


def derive_token(moves_key: bytes, handoff: bytes, name: Literal["commit", "abort", "receipt"]) -> bytes:
    """A token, 32 bytes.

    Args:
        moves_key: of the VM in this chip, 32 bytes.
        handoff: its id, 16 bytes.
        name: which one.
    """
    return HKDF(SHA256(), TOKEN_BYTES, handoff, b"spvtpm handoff " + name.encode()).derive(moves_key)


def sha256_of(token: bytes) -> bytes:
    """By which the other side knows it, 32 bytes."""
    return hashlib.sha256(token).digest()


def check_token(token: bytes, sha256: bytes, name: str) -> None:
    """Whether it is the token that is waited for.

    Raises:
        WrongToken: it is not.
    """
    if not hmac.compare_digest(sha256_of(token), sha256):
        raise WrongToken(f"this is not the {name} token of the handoff")
