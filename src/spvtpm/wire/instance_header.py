"""The clear header of an instance file: what everybody may read of an exported vTPM. Needs no key and no cryptography.

`InstanceHeader` is what the header says of the vTPM; `SealedHeader` is that and what belongs to the one file. Nothing
in either is believed before the header's tag is checked, which `instance_file.py` does.

Source: docs/formats/instance-file.md, "Header".
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Final, Self

from spvtpm.wire.errors import InstanceFileError, InstanceFormatUnknown, InstanceTruncated

MAGIC: Final[bytes] = b"SPVTPMIF"
FORMAT_VERSION: Final[int] = 1
CHUNK_BYTES: Final[int] = 1 << 16
"""Content in every chunk but the last, which holds the rest."""

TAG_BYTES: Final[int] = 16
"""Source: NIST SP 800-38D, 5.2.1.2, the longest tag of GCM."""

ID_BYTES: Final[int] = 16
SALT_BYTES: Final[int] = 32
KEY_CHECK_BYTES: Final[int] = 32
HEADER_TAG_BYTES: Final[int] = 32

MAX_INSTANCE_VERSION: Final[int] = (1 << 63) - 1
MAX_GENERATION: Final[int] = (1 << 32) - 1
MAX_CREATED_S: Final[int] = 253_402_300_799
"""The last second of the year 9999: all that a calendar can show."""

MAX_PERMANENT_BYTES: Final[int] = 1 << 18
MAX_VOLATILE_BYTES: Final[int] = 1 << 16
MAX_CONTENT_BYTES: Final[int] = MAX_PERMANENT_BYTES + MAX_VOLATILE_BYTES + (1 << 15)
"""Both states, and room for all else that the content may hold."""

_PREFIX: Final = struct.Struct(">8sH")
_FIELDS: Final = struct.Struct(">8sHHI16s16s16sQQII32s32s")
SIGNED_BYTES: Final[int] = _FIELDS.size
"""What the header's tag is over: all of the header but the tag."""

HEADER_BYTES: Final[int] = SIGNED_BYTES + HEADER_TAG_BYTES
_HIBERNATED: Final[int] = 1


def sealed_bytes(content_bytes: int) -> int:
    """How long the body is for so much content: with a tag for each chunk."""
    return content_bytes + -(-content_bytes // CHUNK_BYTES) * TAG_BYTES


MAX_FILE_BYTES: Final[int] = HEADER_BYTES + sealed_bytes(MAX_CONTENT_BYTES)
"""No instance file is longer; who reads one from a disk or a stream need not look further."""


def _require_range(what: str, number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        raise InstanceFileError(f"the {what} is {number}; allowed are {low} to {high}")


@dataclass(frozen=True, slots=True)
class InstanceHeader:
    """What an instance file says of its vTPM in clear.

    Attributes:
        vtpm_id: the vTPM; the same in every file of it.
        vm_id: the VM that it was bound to.
        fleet_id: 16 bytes; names the fleet whose `SpSecret` is half of the key.
        version: of the instance; 1 to 2^63 - 1, greater with each export.
        generation: of the `SpSecret`, 1 to 2^32 - 1.
        created_s: when it was exported; seconds since 1970, UTC, as the exporting side's clock had it.
        hibernated: whether the VM goes on where it was; otherwise the vTPM was shut down in order.

    Raises:
        InstanceFileError: a value is out of its bounds.
    """

    vtpm_id: uuid.UUID
    vm_id: uuid.UUID
    fleet_id: bytes
    version: int
    generation: int
    created_s: int
    hibernated: bool

    def __post_init__(self) -> None:
        _require_range("size of the fleet id", len(self.fleet_id), ID_BYTES, ID_BYTES)
        _require_range("instance version", self.version, 1, MAX_INSTANCE_VERSION)
        _require_range("SpSecret generation", self.generation, 1, MAX_GENERATION)
        _require_range("time of export", self.created_s, 0, MAX_CREATED_S)


@dataclass(frozen=True, slots=True)
class SealedHeader:
    """A file's header, but for its tag.

    Attributes:
        instance: what it says of the vTPM.
        content_bytes: 1 to `MAX_CONTENT_BYTES`; how long the content is before it is sealed.
        salt: 32 bytes, fresh for each file.
        key_check: 32 bytes; tells whether keys are the file's.

    Raises:
        InstanceFileError: the content's size is out of its bounds.
    """

    instance: InstanceHeader
    content_bytes: int
    salt: bytes
    key_check: bytes

    def __post_init__(self) -> None:
        _require_range("size of the content", self.content_bytes, 1, MAX_CONTENT_BYTES)

    def encode(self) -> bytes:
        """The header's bytes up to its tag, `SIGNED_BYTES` of them."""
        instance = self.instance
        return _FIELDS.pack(
            *(MAGIC, FORMAT_VERSION, _HIBERNATED if instance.hibernated else 0, self.content_bytes),
            *(instance.vtpm_id.bytes, instance.vm_id.bytes, instance.fleet_id, instance.version, instance.created_s),
            *(instance.generation, 0, self.salt, self.key_check),
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a header; hostile bytes.

        Args:
            data: the beginning of a file; what lies behind the header is not looked at.

        Raises:
            InstanceFileError: no instance file, a reserved bit set, or a value out of its bounds.
            InstanceFormatUnknown: of another format version.
            InstanceTruncated: it ends inside the header.
        """
        if data[: len(MAGIC)] != MAGIC[: len(data)]:
            raise InstanceFileError("it does not begin as an instance file does")
        if len(data) >= _PREFIX.size and (found := _PREFIX.unpack_from(data)[1]) != FORMAT_VERSION:
            raise InstanceFormatUnknown(f"an instance file of format version {found}; known is {FORMAT_VERSION}")
        if len(data) < HEADER_BYTES:
            raise InstanceTruncated(f"the instance file ends inside its header, after {len(data)} bytes")
        _magic, _version, flags, content_bytes, vtpm_id, vm_id, fleet_id, version, created_s, *rest = (
            _FIELDS.unpack_from(data)
        )
        generation, reserved, salt, key_check = rest
        if flags & ~_HIBERNATED or reserved:
            raise InstanceFileError("a reserved bit is set in the instance file's header")
        instance = InstanceHeader(
            *(uuid.UUID(bytes=vtpm_id), uuid.UUID(bytes=vm_id), fleet_id, version, generation, created_s),
            hibernated=bool(flags & _HIBERNATED),
        )
        return cls(instance, content_bytes, salt, key_check)


def parse_instance_header(data: bytes) -> InstanceHeader:
    """What an instance file says of itself, for a side that cannot check it: whoever gave it may have made it up.

    Args:
        data: the file, or at least its first `HEADER_BYTES` bytes.

    Raises:
        InstanceFileError: no instance file, a reserved bit set, or a value out of its bounds.
        InstanceFormatUnknown: of another format version.
        InstanceTruncated: it ends inside the header.
    """
    return SealedHeader.parse(data).instance
