"""Fuses sealed to the host's own TPM 2.0: the chip encrypted under a key that this TPM gives out to this boot chain alone.

Files: `sealed`, which holds ciphertext and what the TPM made of the key; docs/formats/fuses.md. The counter is the TPM's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from spvtpm.files import create_file
from spvtpm.processor.fuses import Fuses
from spvtpm.processor.fuses.host_tpm import CounterIndex, HostTpm, SealedKey, host_tpm
from spvtpm.processor.fuses.sealing import KEY_BYTES, MAX_SEALED_BYTES, new_key, read_sealed_file, seal, unseal
from spvtpm.wire.checksummed import ChecksummedFile
from spvtpm.wire.chip_file import MAX_CHIP_FILE_BYTES, Chip, encode_chip_file, parse_chip_file
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import ChipFileError, FusesError

_LABEL = b"spvtpm fuses sealed to a TPM v1"
_MAX_BLOB_BYTES = 1024
_Blob = Annotated[bytes, Meta(min_length=1, max_length=_MAX_BLOB_BYTES)]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: nothing in it is secret to its TPM's host alone."""

    parent: _Blob
    public: _Blob
    private: _Blob
    content: Annotated[bytes, Meta(max_length=MAX_SEALED_BYTES)]


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is encrypted: the chip file, the counter, and its number when the chip was burnt."""

    chip: Annotated[bytes, Meta(max_length=MAX_CHIP_FILE_BYTES)]
    counter_index: Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
    counter_name: _Blob
    counter_auth: _Blob
    counter_base: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


_FILE = ChecksummedFile("sealed", 1, _Sealed)


class TpmCounter:
    """A counter in the TPM's NV memory, counted from where it was when the chip was burnt.

    Args:
        tcti: how tpm2-tss reaches the TPM.
        index: the counter.
        base: its number when the chip was burnt.
    """

    pace_s = 3600.0
    """A TPM's NV memory is made for some hundred thousand writes: one an hour is 88,000 in ten years."""

    def __init__(self, tcti: str, index: CounterIndex, base: int) -> None:
        self._tcti = tcti
        self.index = index
        self._base = base

    def read(self) -> int:
        with host_tpm(self._tcti) as tpm:
            return self._since_burnt(tpm.read(self.index))

    def increment(self) -> int:
        with host_tpm(self._tcti) as tpm:
            return self._since_burnt(tpm.increment(self.index))

    def _since_burnt(self, number: int) -> int:
        if number < self._base:
            raise FusesError("the counter in the host's TPM is smaller than when the chip was sealed")
        return number - self._base


def seal_to_tpm(directory: Path, chip: Chip, tcti: str, pcrs: tuple[int, ...]) -> None:
    """Seals a chip to the host's TPM, its PCRs as they are now, and begins its counter.

    Raises:
        AlreadyExists: there is a chip in this directory.
        FusesError: the TPM does not answer, or refuses.
        StorageError: the file cannot be written.
    """
    with host_tpm(tcti) as tpm, tpm.new_counter() as counter:
        create_file(directory / "sealed", _sealed_file(tpm, chip, counter, pcrs))


def _sealed_file(tpm: HostTpm, chip: Chip, counter: CounterIndex, pcrs: tuple[int, ...]) -> bytes:
    content = _Content(encode_chip_file(chip), counter.index, counter.name, counter.auth, tpm.read(counter))
    key = new_key()
    sealed = tpm.seal(key, pcrs)
    ciphertext = seal(key, _LABEL, msgspec.json.encode(content))
    return _FILE.encode(_Sealed(sealed.parent, sealed.public, sealed.private, ciphertext))


def load_from_tpm(directory: Path, tcti: str, pcrs: tuple[int, ...]) -> Fuses:
    """The fuses, with the TPM's consent.

    Raises:
        FusesError: the file is missing or damaged, this is another TPM, its PCRs have changed, or its counter is gone.
    """
    path = directory / "sealed"
    file = read_sealed_file(path, _FILE)
    with host_tpm(tcti) as tpm:
        key = tpm.unseal(SealedKey(file.parent, file.public, file.private), pcrs)
    if len(key) != KEY_BYTES:
        raise FusesError(f"{path} is damaged: what the TPM keeps is no key")
    return _fuses(unseal(key, _LABEL, file.content), tcti)


def _fuses(decrypted: bytes, tcti: str) -> Fuses:
    try:
        content = msgspec.json.decode(decrypted, type=_Content)
        chip = parse_chip_file(content.chip)
    except (*UNDECODABLE, ChipFileError):
        raise FusesError("what was sealed to the host's TPM is no chip") from None
    counter = CounterIndex(content.counter_index, content.counter_name, content.counter_auth)
    return Fuses.of_chip(chip, TpmCounter(tcti, counter, content.counter_base))
