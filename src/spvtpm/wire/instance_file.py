"""An exported vTPM as a file that only the owner's secret and the secure processor's open together. Does no I/O.

Keys. Two secrets of 32 bytes, neither of which is enough: the owner's `UserSecret`, and the fleet's `SpSecret` of one
generation. A fresh salt for each file makes fresh keys for each, so the chunks' nonces can simply count.

    keys = HKDF-SHA-256(32 || UserSecret || 32 || SpSecret, salt,
                        info = "spvtpm instance file v1" || vTPM id || fleet id || generation)
         = header key || payload key || key-check value

The file: a clear header, authenticated by HMAC-SHA-256 under the header key; then the content in chunks of 64 KiB, each
sealed with AES-256-GCM under the payload key, bound to its number, to whether it is the last, and to the header.

`seal_instance` and `open_instance` take whole files, `InstanceWriter` and `InstanceReader` pieces of any size. A reader
gives out no state before the last chunk is authentic and the content is what the format allows.

Source: docs/formats/instance-file.md. The chunks are those of STREAM (Hoang, Reyhanitabar, Rogaway, Vizár: Online
Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance, CRYPTO 2015) with the shape that age gave it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.wire.errors import (
    InstanceDamaged,
    InstanceFileError,
    InstanceOverlong,
    InstanceTruncated,
    WrongInstanceKeys,
)
from spvtpm.wire.instance_content import Instance, Policy, decode_content, encode_content
from spvtpm.wire.instance_header import (
    CHUNK_BYTES,
    HEADER_BYTES,
    MAX_FILE_BYTES,
    SALT_BYTES,
    SIGNED_BYTES,
    InstanceHeader,
    SealedHeader,
    parse_instance_header,
    sealed_bytes,
)

__all__ = [
    "HEADER_BYTES",
    "MAX_FILE_BYTES",
    "SECRET_BYTES",
    "Instance",
    "InstanceHeader",
    "InstanceReader",
    "InstanceSecrets",
    "InstanceWriter",
    "Policy",
    "UserSecret",
    "open_instance",
    "parse_instance_header",
    "seal_instance",
]

SECRET_BYTES: Final[int] = 32
_KEY_BYTES: Final[int] = 32
_INFO: Final[bytes] = b"spvtpm instance file v1"


def _require_secret(value: bytes) -> bytes:
    if len(value) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(value)} bytes where {SECRET_BYTES} belong")
    return bytes(value)


class UserSecret:
    """The owner's half of the keys, the same for all vTPMs of the owner. No `repr` shows it.

    Args:
        value: 32 random bytes; no passphrase.

    Raises:
        ValueError: it has another size.
    """

    __slots__ = ("value",)

    def __init__(self, value: bytes) -> None:
        self.value: Final = _require_secret(value)

    def __repr__(self) -> str:
        return "UserSecret()"


class InstanceSecrets:
    """Both halves of the keys, as an SP alone has them together. No `repr` shows them.

    Args:
        user: the owner's `UserSecret`.
        sp: 32 bytes; the fleet's `SpSecret` of the generation that the file's header names.

    Raises:
        ValueError: the `SpSecret` has another size.
    """

    __slots__ = ("sp", "user")

    def __init__(self, user: UserSecret, sp: bytes) -> None:
        self.user: Final = user
        self.sp: Final = _require_secret(sp)

    def __repr__(self) -> str:
        return "InstanceSecrets()"


class _Keys:
    """The keys of one file."""

    __slots__ = ("_header_key", "_payload", "check")

    def __init__(self, secrets: InstanceSecrets, header: InstanceHeader, salt: bytes) -> None:
        both = b"".join(len(half).to_bytes(2, "big") + half for half in (secrets.user.value, secrets.sp))
        info = _INFO + header.vtpm_id.bytes + header.fleet_id + header.generation.to_bytes(4, "big")
        keys = HKDF(SHA256(), 3 * _KEY_BYTES, salt, info).derive(both)
        self._header_key = keys[:_KEY_BYTES]
        self._payload = AESGCM(keys[_KEY_BYTES : 2 * _KEY_BYTES])
        self.check: Final = keys[2 * _KEY_BYTES :]

    def header_mac(self, signed: bytes) -> HMAC:
        mac = HMAC(self._header_key, SHA256())
        mac.update(signed)
        return mac

    def seal_chunk(self, number: int, last: bool, chunk: bytes, header_hash: bytes) -> bytes:
        return self._payload.encrypt(_nonce(number, last), chunk, header_hash)

    def open_chunk(self, number: int, last: bool, chunk: bytes, header_hash: bytes) -> bytes:
        return self._payload.decrypt(_nonce(number, last), chunk, header_hash)


def _nonce(number: int, last: bool) -> bytes:
    """12 bytes: the chunk's number in 11, big-endian, then 1 for the last chunk and 0 for the others."""
    return number.to_bytes(11, "big") + bytes([last])


def _hash(header: bytes) -> bytes:
    digest = Hash(SHA256())
    digest.update(header)
    return digest.finalize()


def _fresh_salt() -> bytes:
    """Never anything else than new random bytes: the same salt again would be the same keys and nonces again."""
    return os.urandom(SALT_BYTES)


class InstanceWriter:
    """Seals one instance under fresh keys, to be taken in pieces of any size.

    Args:
        instance: what is exported.
        secrets: of the owner, and of the fleet's generation that the instance's header names.

    Attributes:
        size_bytes: how long the file is.

    Raises:
        InstanceFileError: a part of the instance is out of its bounds.
    """

    def __init__(self, instance: Instance, secrets: InstanceSecrets) -> None:
        content = encode_content(instance)
        salt = _fresh_salt()
        keys = _Keys(secrets, instance.header, salt)
        header = SealedHeader(instance.header, len(content), salt, keys.check)
        self.size_bytes: Final = HEADER_BYTES + sealed_bytes(len(content))
        self._units = self._seal(keys, header.encode(), content)
        self._buffer = bytearray()

    @staticmethod
    def _seal(keys: _Keys, signed: bytes, content: bytes) -> Iterator[bytes]:
        header = signed + keys.header_mac(signed).finalize()
        yield header
        header_hash = _hash(header)
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            last = start + CHUNK_BYTES >= len(content)
            yield keys.seal_chunk(start // CHUNK_BYTES, last, chunk, header_hash)

    def read(self, limit_bytes: int) -> bytes:
        """The next bytes of the file; none once it has been read whole.

        Args:
            limit_bytes: at most so many, 1 or more; fewer come at the end alone.
        """
        while len(self._buffer) < limit_bytes and (unit := next(self._units, b"")):
            self._buffer += unit
        piece = bytes(self._buffer[:limit_bytes])
        del self._buffer[:limit_bytes]
        return piece


class InstanceReader:
    """Opens one file that comes in pieces of any size. Holds one chunk of it, and what was found authentic.

    Feed it the pieces, then say `finish`, once. After that, and after any error, it is dead and has forgotten what it
    held.

    Args:
        secrets_for: gives the secrets for the header of a file. That header is **not yet authentic**: it may choose
            between secrets, and nothing else. What it raises comes through.
    """

    def __init__(self, secrets_for: Callable[[InstanceHeader], InstanceSecrets]) -> None:
        self._secrets_for = secrets_for
        self._alive = True
        self._unit = bytearray()  # header or chunk, as far as it has come
        self._unit_bytes = HEADER_BYTES  # its size; 0 behind the last chunk
        self._content = bytearray()  # authentic
        self._sealed: tuple[SealedHeader, _Keys, bytes] | None = None  # header, keys, hash of the header's bytes

    def feed(self, data: bytes) -> InstanceHeader | None:
        """Takes the next bytes of the file.

        Returns:
            The header, once: when these bytes complete it and it is authentic. Otherwise None.

        Raises:
            InstanceFileError: no instance file, a reserved bit set, or a value in the header out of its bounds.
            InstanceFormatUnknown: of another format version.
            WrongInstanceKeys: the key-check value is not that of these secrets.
            InstanceDamaged: the header or a chunk is not authentic.
            InstanceOverlong: there is more than the header announced.
        """
        with self._until_it_fails():
            known, rest = self._sealed, memoryview(data)
            while rest:
                if not self._unit_bytes:
                    raise InstanceOverlong("bytes follow the last chunk of the instance file")
                piece = rest[: self._unit_bytes - len(self._unit)]
                self._unit += piece
                rest = rest[len(piece) :]
                if len(self._unit) == self._unit_bytes:
                    self._take_unit(bytes(self._unit))
                    self._unit.clear()
            return self._sealed[0].instance if self._sealed is not None and known is None else None

    def finish(self) -> Instance:
        """Says that the file has ended; returns what it held.

        Raises:
            InstanceTruncated: it ended too early.
            InstanceFileError: no instance file, or its content is not what the format allows.
            InstanceFormatUnknown: it ended inside the header, and is of another format version.
        """
        with self._until_it_fails():
            if self._sealed is None:
                SealedHeader.parse(bytes(self._unit))  # raises: it is not whole, or it would have been taken
            if self._sealed is None or self._unit_bytes:
                raise InstanceTruncated("the instance file ends before the last byte that its header announces")
            instance = decode_content(self._sealed[0].instance, bytes(self._content))
        self._forget()
        return instance

    def _take_unit(self, unit: bytes) -> None:
        left = self._take_header(unit) if self._sealed is None else self._take_chunk(unit, *self._sealed)
        self._unit_bytes = sealed_bytes(min(left, CHUNK_BYTES))

    def _take_header(self, data: bytes) -> int:
        """Checks the header; returns how much content must follow."""
        header = SealedHeader.parse(data)
        keys = _Keys(self._secrets_for(header.instance), header.instance, header.salt)
        if not bytes_eq(keys.check, header.key_check):
            raise WrongInstanceKeys("the secrets at hand are not those that the instance file was sealed under")
        try:
            keys.header_mac(data[:SIGNED_BYTES]).verify(data[SIGNED_BYTES:])
        except InvalidSignature:
            raise InstanceDamaged("the instance file's header is not authentic") from None
        self._sealed = header, keys, _hash(data)
        return header.content_bytes

    def _take_chunk(self, unit: bytes, header: SealedHeader, keys: _Keys, header_hash: bytes) -> int:
        """Opens the next chunk; returns how much content must follow."""
        number = len(self._content) // CHUNK_BYTES
        last = len(self._content) + CHUNK_BYTES >= header.content_bytes
        try:
            self._content += keys.open_chunk(number, last, unit, header_hash)
        except InvalidTag:
            raise InstanceDamaged(f"chunk {number} of the instance file is not authentic at its place") from None
        return header.content_bytes - len(self._content)

    @contextmanager
    def _until_it_fails(self) -> Iterator[None]:
        if not self._alive:
            raise InstanceFileError("this reader has refused its instance file already, or given out what it held")
        try:
            yield
        except BaseException:
            self._forget()
            raise

    def _forget(self) -> None:
        self._alive = False
        self._unit.clear()
        self._content.clear()
        self._sealed = None


def seal_instance(instance: Instance, secrets: InstanceSecrets) -> bytes:
    """The instance as a whole file, under a fresh salt: twice the same instance gives two different files.

    Args:
        instance: what is exported.
        secrets: of the owner, and of the fleet's generation that the instance's header names.

    Raises:
        InstanceFileError: a part of the instance is out of its bounds.
    """
    return InstanceWriter(instance, secrets).read(MAX_FILE_BYTES)


def open_instance(data: bytes, secrets: InstanceSecrets) -> Instance:
    """What a whole file holds; hostile bytes.

    Args:
        data: the file; `parse_instance_header` says which secrets it wants.
        secrets: of the owner, and of the fleet's generation that the header names.

    Raises:
        InstanceFileError: no instance file, or its content is not what the format allows.
        InstanceFormatUnknown: of another format version.
        WrongInstanceKeys: the key-check value is not that of these secrets.
        InstanceDamaged: the header or a chunk is not authentic.
        InstanceTruncated: it ends too early.
        InstanceOverlong: bytes follow its end.
    """
    reader = InstanceReader(lambda _header: secrets)
    reader.feed(data)
    return reader.finish()
