"""The tokens of a handoff (`handoff.py`): who has the key can make them, everybody else only carry them.

    commit, receipt   HKDF-SHA-256(the VM's moves key, salt = handoff id, info = "spvtpm handoff " and the token's name, 32 bytes)
    abort             HKDF-SHA-256(the chip's abort key, salt = handoff id and VM id, info = "spvtpm handoff abort", 32 bytes)
    abort key         HKDF-SHA-256(storage root key, no salt, info = "spvtpm abort key", 32 bytes)

The abort token of a handoff that came to nothing may be asked for when the VM has long gone: destroyed, exported, or given to
another chip. So it does not depend on what is kept of the VM.

Source: RFC 5869. Format: docs/formats/migration.md.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid
from typing import Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.wire.errors import WrongToken

TOKEN_BYTES = 32


def derive_token(moves_key: bytes, handoff: bytes, name: Literal["commit", "receipt"]) -> bytes:
    """A commit or receipt token, 32 bytes.

    Args:
        moves_key: of the VM in this chip, 32 bytes.
        handoff: its id, 16 bytes.
        name: which one.
    """
    return HKDF(SHA256(), TOKEN_BYTES, handoff, b"spvtpm handoff " + name.encode()).derive(moves_key)


def derive_abort_key(storage_root_key: bytes) -> bytes:
    """From which a chip derives all abort tokens, 32 bytes.

    Args:
        storage_root_key: of the chip, 32 bytes.
    """
    return HKDF(SHA256(), TOKEN_BYTES, None, b"spvtpm abort key").derive(storage_root_key)


def derive_abort_token(abort_key: bytes, handoff: bytes, vm_id: uuid.UUID) -> bytes:
    """An abort token, 32 bytes.

    Args:
        abort_key: of the chip, 32 bytes.
        handoff: its id, 16 bytes.
        vm_id: the VM: so that nobody is told it who names another one.
    """
    return HKDF(SHA256(), TOKEN_BYTES, handoff + vm_id.bytes, b"spvtpm handoff abort").derive(abort_key)


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
