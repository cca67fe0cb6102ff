"""A directory that stands for fuses: the chip file as the vendor made it, and a counter beside it.

Whoever can write this directory can set the counter back: it protects nothing from an administrator of the host, and is for
development and for tests.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from spvtpm.files import create_file, read_file
from spvtpm.processor.fuses import Fuses
from spvtpm.wire.chip_file import MAX_CHIP_FILE_BYTES, Chip, encode_chip_file, parse_chip_file
from spvtpm.wire.errors import ChipFileError, FusesError, StorageError

_SLOT_BYTES = 512
"""What a disk writes whole, or not at all."""

_SLOT = struct.Struct("<8sQ")
_MAGIC = b"SPVTPMCN"
_DIGEST_BYTES = 32


class FileCounter:
    """The counter: two slots in a file, each with a number and its digest; the greater one counts.

    A step overwrites the slot that does not count, in place: nothing of the file but its content changes, so making it durable
    takes a disk a tenth of the time that a new file would. A milestone of the NV store waits for it.

    Args:
        path: of the file.
    """

    pace_s = 1.0

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        return max(self._slots())

    def _slots(self) -> list[int]:
        """The numbers in both; -1 in one that was being written when the power went."""
        try:
            content = read_file(self._path, 2 * _SLOT_BYTES)
        except StorageError as error:
            raise FusesError(str(error)) from None
        slots = [_number_in(content[at : at + _SLOT_BYTES]) for at in (0, _SLOT_BYTES)]
        if len(content) != 2 * _SLOT_BYTES or max(slots) < 0:
            raise FusesError(f"{self._path} holds no number")
        return slots

    def increment(self) -> int:
        slots = self._slots()
        number = max(slots) + 1
        try:
            with self._path.open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), _slot_of(number), slots.index(min(slots)) * _SLOT_BYTES)
                os.fdatasync(file.fileno())
        except OSError as error:
            raise FusesError(f"cannot write {self._path}: {error.strerror}") from None
        return number


def _slot_of(number: int) -> bytes:
    try:
        head = _SLOT.pack(_MAGIC, number)
    except struct.error:
        raise FusesError("the counter is at its end") from None
    return (head + hashlib.sha256(head).digest()).ljust(_SLOT_BYTES, b"\0")


def _number_in(slot: bytes) -> int:
    head, digest = slot[: _SLOT.size], slot[_SLOT.size : _SLOT.size + _DIGEST_BYTES]
    if not head.startswith(_MAGIC) or hashlib.sha256(head).digest() != digest:
        return -1
    return int(_SLOT.unpack(head)[1])


def counter_at(number: int) -> bytes:
    """A counter's file that stands at this number."""
    return _slot_of(number) + bytes(_SLOT_BYTES)


def begin_counter(directory: Path) -> None:
    """A counter at 0, if there is none.

    Raises:
        StorageError: it cannot be written.
    """
    if not (directory / "counter").exists():
        create_file(directory / "counter", counter_at(0))


def keep_in_file(directory: Path, chip: Chip) -> None:
    """Writes a chip into the directory.

    Raises:
        AlreadyExists: there is one.
        StorageError: it cannot be written.
    """
    begin_counter(directory)
    create_file(directory / "chip", encode_chip_file(chip))


def load_from_file(directory: Path) -> Fuses:
    """The fuses.

    Raises:
        FusesError: the chip is missing, readable by others, or damaged.
    """
    try:
        chip = parse_chip_file(read_file(directory / "chip", MAX_CHIP_FILE_BYTES))
    except ChipFileError as error:
        raise FusesError(f"the fuses in {directory}: {error}") from None
    except StorageError as error:
        raise FusesError(str(error)) from None
    return Fuses.of_chip(chip, FileCounter(directory / "counter"))
