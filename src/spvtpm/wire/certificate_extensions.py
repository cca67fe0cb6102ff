"""What only our certificates say: which chip, which fleet, which firmware, what it can do. Pure; for all who read or make them.

Two certificate extensions and one purpose, under an arc that belongs to this project because its UUID does (ITU-T X.667:
`2.25.<UUID as a number>` needs no registration). Both extensions are **non-critical**: `openssl verify` and every TLS library
refuse a certificate with a critical extension that they do not know, and a stranger shall be able to check these with
nothing but them. That our own side reads them is not left to that flag: the profiles demand the extension
(`certificates.py`). Another meaning of a field would get another OID.

The content is strict DER (ITU-T X.690) of at most 127 bytes, so that each length is one byte:

    ChipIdentity    ::= SEQUENCE { chipId OCTET STRING (SIZE(16)), fleetId OCTET STRING (SIZE(16)),
                                   features Features, model UTF8String (SIZE(1..64)) }
    ChannelIdentity ::= SEQUENCE { chipId OCTET STRING (SIZE(16)), firmware INTEGER (0..4294967295), features Features }
    Features        ::= BIT STRING { secureVirtualisation(0), vtpm(1) } (SIZE(0..32))
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import KEEP, IntFlag

from cryptography.x509 import ObjectIdentifier

from spvtpm.wire.errors import CertificateError

ARC = f"2.25.{uuid.UUID('048953d0-ae88-461e-8b57-5f76369f6674').int}"
"""The root of all object identifiers of this project."""

CHIP_IDENTITY = ObjectIdentifier(f"{ARC}.1.1")
CHANNEL_IDENTITY = ObjectIdentifier(f"{ARC}.1.2")
CHANNEL_PURPOSE = ObjectIdentifier(f"{ARC}.2.1")
"""Extended key usage: the key speaks for a secure processor on the confidential channel."""

CHIP_ID_BYTES = 16
FLEET_ID_BYTES = 16
MAX_MODEL_BYTES = 64
MAX_FIRMWARE = 0xFFFFFFFF

_SEQUENCE, _OCTET_STRING, _BIT_STRING, _INTEGER, _UTF8_STRING = 0x30, 0x04, 0x03, 0x02, 0x0C
_MAX_SHORT_LENGTH = 127
_MAX_FEATURE_BITS = 32


class Features(IntFlag, boundary=KEEP):
    """What a chip, or the firmware on it, can do. A reader keeps the bits that it does not know, and asks for those it needs."""

    SECURE_VIRTUALISATION = 1 << 0
    VTPM = 1 << 1


@dataclass(frozen=True, slots=True)
class ChipIdentity:
    """What the vendor says of a chip, in its chip EK certificate.

    Attributes:
        chip_id: 16 bytes.
        fleet_id: 16 bytes; chips of one fleet share the ladder of `SpSecret`s.
        features: what the hardware can do.
        model: the hardware, 1 to 64 bytes of printable UTF-8.
    """

    chip_id: bytes
    fleet_id: bytes
    features: Features
    model: str

    def __post_init__(self) -> None:
        if len(self.chip_id) != CHIP_ID_BYTES or len(self.fleet_id) != FLEET_ID_BYTES:
            raise ValueError("chip id and fleet id have 16 bytes each")
        if not self.model.isprintable() or not 1 <= len(self.model.encode()) <= MAX_MODEL_BYTES:
            raise ValueError(f"the model is not 1 to {MAX_MODEL_BYTES} bytes of printable text")

    def encode(self) -> bytes:
        """The extension's content."""
        return _sequence(
            (_OCTET_STRING, self.chip_id),
            (_OCTET_STRING, self.fleet_id),
            (_BIT_STRING, _encode_features(self.features)),
            (_UTF8_STRING, self.model.encode()),
        )


@dataclass(frozen=True, slots=True)
class ChannelIdentity:
    """What a chip says of the firmware that runs on it, in the certificate of its channel key.

    Attributes:
        chip_id: 16 bytes, the chip's own.
        firmware: version, an unsigned number of 32 bits; a greater one is newer.
        features: what this firmware makes of the hardware's.
    """

    chip_id: bytes
    firmware: int
    features: Features

    def __post_init__(self) -> None:
        if len(self.chip_id) != CHIP_ID_BYTES:
            raise ValueError("a chip id has 16 bytes")
        if not 0 <= self.firmware <= MAX_FIRMWARE:
            raise ValueError("the firmware's version does not fit into 32 bits")

    def encode(self) -> bytes:
        """The extension's content."""
        return _sequence(
            (_OCTET_STRING, self.chip_id),
            (_INTEGER, self.firmware.to_bytes(self.firmware.bit_length() // 8 + 1, "big")),
            (_BIT_STRING, _encode_features(self.features)),
        )


def parse_chip_identity(content: bytes) -> ChipIdentity:
    """Reads the chip's extension; hostile bytes.

    Raises:
        CertificateError: it is not exactly what `ChipIdentity.encode` writes.
    """
    try:
        chip_id, fleet_id, features, model = _fields(content, (_OCTET_STRING, _OCTET_STRING, _BIT_STRING, _UTF8_STRING))
        identity = ChipIdentity(chip_id, fleet_id, _parse_features(features), model.decode())
    except ValueError as error:  # text that is no UTF-8 is one, too
        raise CertificateError(f"the chip certificate's identity extension is malformed: {error}") from None
    if identity.encode() != content:
        raise CertificateError("the chip certificate's identity extension is not strict DER")
    return identity


def parse_channel_identity(content: bytes) -> ChannelIdentity:
    """Reads the channel's extension; hostile bytes.

    Raises:
        CertificateError: it is not exactly what `ChannelIdentity.encode` writes.
    """
    try:
        chip_id, firmware, features = _fields(content, (_OCTET_STRING, _INTEGER, _BIT_STRING))
        version = int.from_bytes(firmware, "big", signed=True)
        identity = ChannelIdentity(chip_id, version, _parse_features(features))
    except ValueError as error:
        raise CertificateError(f"the channel certificate's identity extension is malformed: {error}") from None
    if identity.encode() != content:
        raise CertificateError("the channel certificate's identity extension is not strict DER")
    return identity


def _sequence(*fields: tuple[int, bytes]) -> bytes:
    content = b"".join(bytes([tag, len(value)]) + value for tag, value in fields)
    return bytes([_SEQUENCE, len(content)]) + content


def _fields(content: bytes, tags: tuple[int, ...]) -> list[bytes]:
    """The values of a sequence that has exactly these fields."""
    found, rest = [], _value(content, _SEQUENCE)
    if len(rest) + 2 != len(content):
        raise ValueError("bytes follow it")
    for tag in tags:
        value = _value(rest, tag)
        found.append(value)
        rest = rest[2 + len(value) :]
    if rest:
        raise ValueError("it has more fields than it should")
    return found


def _value(content: bytes, tag: int) -> bytes:
    if len(content) < 2 or content[0] != tag:
        raise ValueError("a field is missing or has another type")
    length = content[1]
    if length > _MAX_SHORT_LENGTH or length > len(content) - 2:
        raise ValueError("a field is too long")
    return content[2 : 2 + length]


def _encode_features(features: Features) -> bytes:
    """The bit string's content: the number of unused bits, then the bits, of which the first is the highest."""
    bits = int(features).bit_length()
    if int(features) < 0 or bits > _MAX_FEATURE_BITS:
        raise ValueError(f"there are at most {_MAX_FEATURE_BITS} features")
    unused = -bits % 8
    text = f"{int(features):0{bits}b}"[::-1] if bits else "0"
    return bytes([unused]) + (int(text, 2) << unused).to_bytes((bits + 7) // 8, "big")


def _parse_features(content: bytes) -> Features:
    if not 1 <= len(content) <= 1 + _MAX_FEATURE_BITS // 8:
        raise ValueError("it has a bit string of another size")
    bits = "".join(f"{byte:08b}" for byte in content[1:])
    return Features(int(bits[::-1] or "0", 2))
