"""The file `sealed`, and its content under a key that hardware keeps: AES-256-GCM, one message for each key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from spvtpm.files import read_file
from spvtpm.wire.checksummed import ChecksummedFile, WrongChecksum
from spvtpm.wire.chip_file import MAX_CHIP_FILE_BYTES
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import FusesError, StorageError

KEY_BYTES = 32
MAX_SEALED_BYTES = 2 * MAX_CHIP_FILE_BYTES

_MAX_FILE_BYTES = 2 * MAX_SEALED_BYTES
_NONCE_BYTES = 12
_Sealed = TypeVar("_Sealed", bound=msgspec.Struct)


def read_sealed_file(path: Path, kind: ChecksummedFile[_Sealed]) -> _Sealed:
    """What the file holds.

    Raises:
        FusesError: it is missing, readable by others, or damaged.
    """
    try:
        return kind.decode(read_file(path, _MAX_FILE_BYTES))
    except WrongChecksum:
        raise FusesError(f"{path} is damaged: its checksum is wrong") from None
    except UNDECODABLE:
        raise FusesError(f"{path} is damaged, or no sealed chip of format 1") from None
    except StorageError as error:
        raise FusesError(str(error)) from None


def new_key() -> bytes:
    """32 fresh bytes."""
    return AESGCM.generate_key(KEY_BYTES * 8)


def seal(key: bytes, label: bytes, content: bytes) -> bytes:
    """The content, secret and authentic: a nonce, then ciphertext and tag.

    Args:
        key: 32 bytes, for this content alone.
        label: what kind of content it is; authenticated.
        content: at most about 32,000 bytes.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, label)


def unseal(key: bytes, label: bytes, sealed: bytes) -> bytes:
    """What was sealed.

    Raises:
        FusesError: it was altered, or sealed under another key.
    """
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], label)
    except (InvalidTag, ValueError):
        raise FusesError("what is sealed was altered, or is of another chip") from None
