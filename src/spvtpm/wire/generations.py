"""The ladder of `SpSecret`s: a generation gives all older ones, and none that is newer. Pure; for the vendor and its chips.

    secret[g] = HKDF-SHA-256(input = secret[g + 1], salt = fleet id, info = "spvtpm sp secret v1" || g as u16, 32 bytes)

g counts from 1; u16 is big-endian. The fleet's top secret, of generation 1,024, is random and stays with the vendor. A chip has
the secret of one generation. So firmware that is given generation g opens what g and all before it have closed, and who takes
the secret out of old firmware has nothing that newer firmware closes.

Source: RFC 5869 (HKDF). Test vectors: tests/vectors/sp_secret.
"""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.wire.errors import GenerationError

SECRET_BYTES = 32
FLEET_ID_BYTES = 16
MAX_GENERATION = 1024
"""A step takes some 10 µs, so the whole ladder some 10 ms."""

_INFO = b"spvtpm sp secret v1"


def ladder_down(secret: bytes, fleet_id: bytes, from_generation: int, to_generation: int) -> bytes:
    """The secret of an older generation.

    Args:
        secret: 32 bytes, of `from_generation`.
        fleet_id: 16 bytes.
        from_generation: 1 to 1,024.
        to_generation: 1 to `from_generation`.

    Raises:
        GenerationError: there is no such generation, or it is newer than the one at hand.
    """
    if len(secret) != SECRET_BYTES or len(fleet_id) != FLEET_ID_BYTES:
        raise ValueError("an SpSecret has 32 bytes, a fleet id 16")
    for generation in (from_generation, to_generation):
        if not 1 <= generation <= MAX_GENERATION:
            raise GenerationError(f"there is no generation {generation}: they count from 1 to {MAX_GENERATION}")
    if to_generation > from_generation:
        raise GenerationError(f"generation {to_generation} is newer than {from_generation}, which this chip has")
    for generation in range(from_generation - 1, to_generation - 1, -1):
        info = _INFO + struct.pack(">H", generation)
        secret = HKDF(SHA256(), SECRET_BYTES, fleet_id, info).derive(secret)
    return secret
