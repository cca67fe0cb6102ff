"""A volatile state, packed for keeping: a fresh one of 9 KiB becomes 1 KiB."""

from __future__ import annotations

import zlib

from spvtpm.processor.worker.messages import MAX_VOLATILE_BYTES
from spvtpm.wire.errors import IntegrityError

_LEVEL = 1
"""zlib's quickest."""


def pack_volatile(volatile: bytes) -> bytes:
    """Packs a state of at most 64 KiB."""
    return zlib.compress(volatile, _LEVEL)


def unpack_volatile(packed: bytes) -> bytes:
    """The state.

    Raises:
        IntegrityError: it is not packed as it should be, or longer than a volatile state can be.
    """
    decompressor = zlib.decompressobj()
    try:
        volatile = decompressor.decompress(packed, MAX_VOLATILE_BYTES)
    except zlib.error:
        volatile = b""
    if not decompressor.eof:
        raise IntegrityError("a volatile state is not packed as it should be")
    return volatile
