"""What keeps a chip's secrets: the fuses directory alone, or hardware that it names. The rest of the SP asks here.

The directory's `keeper.json` says which hardware, so that a secure processor starts without options; without it, there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, assert_never

import msgspec
from msgspec import Meta

from spvtpm.files import read_file, replace_file
from spvtpm.processor.fuses import Fuses
from spvtpm.processor.fuses.file import keep_in_file, load_from_file
from spvtpm.wire.chip_file import MAX_CHIP_FILE_BYTES, Chip, parse_chip_file
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import AlreadyExists, AlreadyInitialised, ChipFileError, FusesError, StorageError

DEFAULT_PCRS = (0, 2, 4, 7)
"""Firmware, its extensions, the boot loader, the state of secure boot.

Source: TCG PC Client Platform Firmware Profile, table "PCR usage".
"""

_MAX_KEEPER_BYTES = 8192
_Text = Annotated[str, Meta(min_length=1, max_length=1024)]
_Pcr = Annotated[int, Meta(ge=0, le=23)]


class Directory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="directory"):
    """Nothing but the fuses directory: for development, for tests, and where the whole disk is the chip's own."""


class HostTpm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="host-tpm"):
    """The host's own TPM 2.0, which opens the chip while its PCRs are as they were, and counts.

    Attributes:
        tcti: how tpm2-tss reaches it: "device:/dev/tpmrm0".
        pcrs: which registers of the SHA-256 bank, in order.
    """

    tcti: _Text
    pcrs: Annotated[tuple[_Pcr, ...], Meta(min_length=1, max_length=24)] = DEFAULT_PCRS


class Pkcs11Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="pkcs11"):
    """A token behind PKCS#11, which certifies inside and opens the rest; its counter is a file.

    Attributes:
        module: path of the library of the token's maker.
        token: the token's label.
        pin_file: path of a private file with the user's PIN.
    """

    module: _Text
    token: _Text
    pin_file: _Text


Keeper = Directory | HostTpm | Pkcs11Token
IN_DIRECTORY = Directory()


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


def burn_fuses(directory: Path, chip_file: Path, keeper: Keeper = IN_DIRECTORY) -> Fuses:
    """Moves a chip into these fuses: the last step of making a secure processor, so that one with fuses is whole.

    The chip file is gone afterwards. A chip that is in two places would be two chips with one identity.

    Raises:
        ChipFileError: it is no chip file.
        AlreadyInitialised: there are fuses; they are burnt once.
        FusesError: they cannot be written, or the hardware does not do its part.
    """
    chip = read_chip_file(chip_file)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        _refuse_second_chip(directory)
        if not isinstance(keeper, Directory):
            replace_file(directory / "keeper.json", msgspec.json.encode(keeper))
        _keep(directory, chip, keeper)
        fuses = load_fuses(directory)
        chip_file.unlink()
    except AlreadyExists:
        raise AlreadyInitialised(f"there is a chip in {directory} already") from None
    except OSError as error:
        raise FusesError(f"cannot write {error.filename or directory}: {error.strerror}") from None
    except FusesError:
        raise
    except StorageError as error:
        raise FusesError(str(error)) from None
    return fuses


def load_fuses(directory: Path) -> Fuses:
    """Reads the fuses, and the counter once.

    Raises:
        FusesError: a file is missing, readable by others, or damaged, or the hardware does not do its part.
    """
    fuses = _load(directory, _read_keeper(directory / "keeper.json"))
    fuses.counter.read()
    return fuses


def _refuse_second_chip(directory: Path) -> None:
    for name in ("chip", "sealed"):
        if (directory / name).exists():
            raise AlreadyExists(name)


def _read_keeper(path: Path) -> Keeper:
    if not path.exists():
        return Directory()
    try:
        keeper: Keeper = msgspec.json.decode(read_file(path, _MAX_KEEPER_BYTES), type=Keeper)
    except UNDECODABLE:
        raise FusesError(f"{path} names nothing that could keep a chip") from None
    except StorageError as error:
        raise FusesError(str(error)) from None
    return keeper


# What a keeper needs beside this package is asked for where it is used, and is an optional extra of it.


def _keep(directory: Path, chip: Chip, keeper: Keeper) -> None:
    match keeper:
        case Directory():
            keep_in_file(directory, chip)
        case HostTpm():
            with _extra("host-tpm"):
                from spvtpm.processor.fuses.sealed_to_tpm import seal_to_tpm
            seal_to_tpm(directory, chip, keeper.tcti, keeper.pcrs)
        case Pkcs11Token():
            with _extra("pkcs11"):
                from spvtpm.processor.fuses.pkcs11_token import Token
                from spvtpm.processor.fuses.sealed_to_token import seal_to_token
            seal_to_token(directory, chip, Token(Path(keeper.module), keeper.token, Path(keeper.pin_file)))
        case _:
            assert_never(keeper)


def _load(directory: Path, keeper: Keeper) -> Fuses:
    match keeper:
        case Directory():
            return load_from_file(directory)
        case HostTpm():
            with _extra("host-tpm"):
                from spvtpm.processor.fuses.sealed_to_tpm import load_from_tpm
            return load_from_tpm(directory, keeper.tcti, keeper.pcrs)
        case Pkcs11Token():
            with _extra("pkcs11"):
                from spvtpm.processor.fuses.pkcs11_token import Token
                from spvtpm.processor.fuses.sealed_to_token import load_from_token
            return load_from_token(directory, Token(Path(keeper.module), keeper.token, Path(keeper.pin_file)))
        case _:
            assert_never(keeper)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise FusesError(f"{error.name or name} is not installed: pip install 'spvtpm[{name}]'") from None
