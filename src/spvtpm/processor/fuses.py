"""Where the chip's own secrets live. Here: a file that stands for fuses, for development and for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from spvtpm.processor.private_files import create_private_file, read_private_file
from spvtpm.wire.checksummed import ChecksummedFile, WrongChecksum
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import AlreadyInitialised, FusesError, StorageError

_MAX_FILE_BYTES = 4096
_Secret32 = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Fuses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The chip's secrets.

    Attributes:
        chip_id: 16 bytes, public.
        storage_root_key: 32 bytes; every NV record is sealed under a key derived from it.
    """

    chip_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    storage_root_key: _Secret32

    def __repr__(self) -> str:
        return f"Fuses(chip_id={self.chip_id.hex()})"


_FILE = ChecksummedFile("fuses", 1, Fuses)


def new_fuses() -> Fuses:
    """A new chip's secrets, fresh and random, not burnt yet."""
    return Fuses(chip_id=os.urandom(16), storage_root_key=os.urandom(32))


def burn_fuses(path: Path, fuses: Fuses) -> None:
    """Writes a new chip's fuses: the last step of making it, so that a chip with fuses is whole.

    Raises:
        AlreadyInitialised: the file exists; fuses are burnt once.
        FusesError: the file cannot be written.
    """
    try:
        create_private_file(path, _FILE.encode(fuses))
    except FileExistsError:
        raise AlreadyInitialised(f"the fuses file {path} exists already") from None
    except OSError as error:
        raise FusesError(f"cannot write the fuses file {path}: {error.strerror}") from None


def load_fuses(path: Path) -> Fuses:
    """Reads the fuses.

    Raises:
        FusesError: the file is missing, readable by others, or damaged.
    """
    try:
        return _FILE.decode(read_private_file(path, _MAX_FILE_BYTES))
    except WrongChecksum:
        raise FusesError(f"the fuses file {path} is damaged: its checksum is wrong") from None
    except StorageError as error:
        raise FusesError(str(error)) from None
    except UNDECODABLE:
        # The decoder's own message is left out: it could quote what it could not read.
        raise FusesError(f"the fuses file {path} is damaged: it is not what `spvtpm sp init` writes") from None
