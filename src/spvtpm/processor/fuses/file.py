"""A directory that stands for fuses: the chip file as the vendor made it, and a counter beside it.

Whoever can write this directory can set the counter back: it protects nothing from an administrator of the host, and is for
development and for tests.
"""

from __future__ import annotations

from pathlib import Path

from spvtpm.files import create_file, read_file, replace_file
from spvtpm.processor.fuses import Fuses
from spvtpm.processor.sp_secret import SpSecret
from spvtpm.wire.chip_file import MAX_CHIP_FILE_BYTES, Chip, parse_chip_file
from spvtpm.wire.errors import AlreadyExists, AlreadyInitialised, ChipFileError, FusesError, StorageError

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


def read_chip_file(path: Path) -> Chip:
    """Reads a chip file, as the vendor made it.

    Raises:
        ChipFileError: it is missing, readable by others, or damaged.
    """
    try:
        return parse_chip_file(read_file(path, MAX_CHIP_FILE_BYTES))
    except ChipFileError:
        raise
    except StorageError as error:
        raise ChipFileError(str(error)) from None


def burn_fuses(directory: Path, chip_file: Path) -> Fuses:
    """Moves a chip into this directory: the last step of making a secure processor, so that one with fuses is whole.

    The chip file is gone afterwards. A chip that is in two places would be two chips with one identity.

    Raises:
        ChipFileError: it is no chip file.
        AlreadyInitialised: there are fuses; they are burnt once.
        FusesError: they cannot be written.
    """
    read_chip_file(chip_file)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if not (directory / "counter").exists():
            create_file(directory / "counter", b"0")
        create_file(directory / "chip", read_file(chip_file, MAX_CHIP_FILE_BYTES))
        chip_file.unlink()
    except AlreadyExists:
        raise AlreadyInitialised(f"there is a chip in {directory} already") from None
    except OSError as error:
        raise FusesError(f"cannot write {error.filename or directory}: {error.strerror}") from None
    except StorageError as error:
        raise FusesError(str(error)) from None
    return load_fuses(directory)


def load_fuses(directory: Path) -> Fuses:
    """Reads the fuses.

    Raises:
        FusesError: a file is missing, readable by others, or damaged.
    """
    try:
        chip = read_chip_file(directory / "chip")
        counter = FileCounter(directory / "counter")
        counter.read()
    except ChipFileError as error:
        raise FusesError(f"the fuses in {directory}: {error}") from None
    secret = SpSecret(chip.fleet_id, chip.generation, chip.sp_secret)
    return Fuses(chip.chip_id, chip.storage_root_key, secret, chip.issuer(), chip.certificates, counter)
