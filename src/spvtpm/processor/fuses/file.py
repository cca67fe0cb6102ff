"""A directory that stands for fuses: the chip file as the vendor made it, and a counter beside it.

Whoever can write this directory can set the counter back: it protects nothing from an administrator of the host, and is for
development and for tests.
"""

from __future__ import annotations

from pathlib import Path

from spvtpm.files import create_file, read_file, replace_file
from spvtpm.processor.fuses import Fuses
from spvtpm.wire.chip_file import MAX_CHIP_FILE_BYTES, Chip, encode_chip_file, parse_chip_file
from spvtpm.wire.errors import ChipFileError, FusesError, StorageError

_MAX_COUNTER_BYTES = 19
"""Room for a step every second for longer than anything lasts."""


class FileCounter:
    """The counter, a decimal number in a file.

    Args:
        path: of the file.
    """

    pace_s = 1.0

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        try:
            content = read_file(self._path, _MAX_COUNTER_BYTES)
        except StorageError as error:
            raise FusesError(str(error)) from None
        if not content.isdigit():
            raise FusesError(f"{self._path} holds no number")
        return int(content)

    def increment(self) -> int:
        number = self.read() + 1
        if len(str(number)) > _MAX_COUNTER_BYTES:
            raise FusesError(f"{self._path} is at its end")
        try:
            replace_file(self._path, str(number).encode())
        except StorageError as error:
            raise FusesError(str(error)) from None
        return number


def begin_counter(directory: Path) -> None:
    """A counter at 0, if there is none.

    Raises:
        StorageError: it cannot be written.
    """
    if not (directory / "counter").exists():
        create_file(directory / "counter", b"0")


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
