"""The fleet's secrets, which the vendor alone has, and the file that holds them. Pure."""

from __future__ import annotations

import os
from typing import Annotated

import msgspec
from msgspec import Meta

from spvtpm.wire.checksummed import ChecksummedFile, WrongChecksum
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import VendorError
from spvtpm.wire.generations import FLEET_ID_BYTES, MAX_GENERATION, SECRET_BYTES, ladder_down

MAX_FLEET_FILE_BYTES = 4096


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fleet.

    Attributes:
        fleet_id: 16 bytes, public.
        top_secret: 32 bytes, the `SpSecret` of generation 1,024, from which all others follow (`generations.py`).
        generation: that chips get now, 1 to 1,024.
    """

    fleet_id: Annotated[bytes, Meta(min_length=FLEET_ID_BYTES, max_length=FLEET_ID_BYTES)]
    top_secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    generation: Annotated[int, Meta(ge=1, le=MAX_GENERATION)]

    def __repr__(self) -> str:
        return f"Fleet(fleet_id={self.fleet_id.hex()}, generation={self.generation})"

    def sp_secret(self) -> bytes:
        """The `SpSecret` of the present generation, 32 bytes."""
        return ladder_down(self.top_secret, self.fleet_id, MAX_GENERATION, self.generation)


_FILE = ChecksummedFile("fleet", 1, Fleet)


def new_fleet() -> Fleet:
    """A fleet with fresh secrets, in generation 1."""
    return Fleet(os.urandom(FLEET_ID_BYTES), os.urandom(SECRET_BYTES), 1)


def encode_fleet(fleet: Fleet) -> bytes:
    """The file's content."""
    return _FILE.encode(fleet)


def parse_fleet(content: bytes) -> Fleet:
    """Reads the file's content.

    Raises:
        VendorError: it is damaged.
    """
    try:
        return _FILE.decode(content)
    except WrongChecksum:
        raise VendorError("the fleet's file is damaged: its checksum is wrong") from None
    except UNDECODABLE:
        # The decoder's own message is left out: it could quote what it could not read.
        raise VendorError("the fleet's file is damaged: it is not what `init_vendor` writes") from None
