"""The instance file once more, written against docs/formats/instance-file.md alone.

It imports nothing of `spvtpm`, makes HKDF and MessagePack itself, and takes AES-GCM alone from the `cryptography`
package. So an error in the format's text, in the package, or here shows as a difference. It only writes, and it writes
wrong files too: each field can be made wrong while all tags are right.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER, CHUNK, TAG = 184, 65536, 16
LONGEST_CONTENT = 360_448
LONGEST_IN_HEX = 4096


def constant(label: str, size: int) -> bytes:
    """Bytes that look random and are always the same."""
    return hashlib.shake_256(f"spvtpm instance vector: {label}".encode()).digest(size)


def _hkdf(key: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869."""
    pseudorandom = hmac.digest(salt, key, "sha256")
    out = block = b""
    while len(out) < size:
        block = hmac.digest(pseudorandom, block + info + bytes([len(out) // 32 + 1]), "sha256")
        out += block
    return out[:size]


# MessagePack, in its shortest forms.

NIL, FALSE, TRUE = b"\xc0", b"\xc2", b"\xc3"


def _sized(size: int, *forms: tuple[int, int, int]) -> bytes:
    """The head of the first form (code, bytes of size, first size that is too much) that the size fits in."""
    code, width = next((code, width) for code, width, bound in forms if size < bound)
    return bytes([code | size]) if width == 0 else bytes([code]) + size.to_bytes(width, "big")


def pack_bin(value: bytes) -> bytes:
    return _sized(len(value), (0xC4, 1, 1 << 8), (0xC5, 2, 1 << 16), (0xC6, 4, 1 << 32)) + value


def pack_str(value: bytes) -> bytes:
    return _sized(len(value), (0xA0, 0, 32), (0xD9, 1, 1 << 8), (0xDA, 2, 1 << 16)) + value


def pack_array(items: Sequence[bytes]) -> bytes:
    return _sized(len(items), (0x90, 0, 16), (0xDC, 2, 1 << 16)) + b"".join(items)


def pack_map(pairs: Sequence[tuple[str, bytes]]) -> bytes:
    return _sized(len(pairs), (0x80, 0, 16)) + b"".join(pack_str(key.encode()) + value for key, value in pairs)


def pack_number(value: int) -> bytes:
    if value < 128:
        return bytes([value])
    return _sized(value, (0xCC, 1, 1 << 8), (0xCD, 2, 1 << 16), (0xCE, 4, 1 << 32), (0xCF, 8, 1 << 64))


def pack_bool(value: bool) -> bytes:
    return TRUE if value else FALSE


@dataclass(frozen=True)
class State:
    """A state of the vTPM; a long one is made of a seed."""

    value: bytes
    seed: bytes = b""

    @classmethod
    def of_size(cls, label: str, size: int) -> State:
        seed = constant(label, 16)
        return cls(hashlib.shake_256(seed).digest(size), seed)

    def lines(self, name: str) -> dict[str, str]:
        if self.seed and len(self.value) > LONGEST_IN_HEX:
            return {f"{name}-seed": self.seed.hex(), f"{name}-size": str(len(self.value))}
        return {name: self.value.hex()}


@dataclass(frozen=True)
class Content:
    """Section "Content" of the format. `altered` puts other MessagePack in a value's place, or takes a key away."""

    permanent: State = State(constant("permanent", 40))
    volatile: State | None = None
    migration_allowed: bool = True
    chips: tuple[bytes, ...] | None = None
    minimum_firmware: int = 2
    direct_path_only: bool = False
    pcr_banks: tuple[str, ...] = ("sha256",)
    certificates: tuple[bytes, ...] = (constant("EK certificate 0", 30), constant("EK certificate 1", 20))
    issuer: tuple[bytes, ...] = tuple(constant(f"issuer {number}", 25) for number in range(3))
    label: str = "web 1"
    altered: Mapping[str, bytes | None] = field(default_factory=dict, hash=False)

    def policy(self) -> list[tuple[str, bytes]]:
        chips = NIL if self.chips is None else pack_array([pack_bin(chip) for chip in self.chips])
        return self._with_alterations(
            ("migration_allowed", pack_bool(self.migration_allowed)),
            ("chips", chips),
            ("minimum_firmware", pack_number(self.minimum_firmware)),
            ("direct_path_only", pack_bool(self.direct_path_only)),
            ("pcr_banks", pack_array([pack_str(bank.encode()) for bank in self.pcr_banks])),
        )

    def endorsement(self) -> list[tuple[str, bytes]]:
        return self._with_alterations(
            ("certificates", pack_array([pack_bin(certificate) for certificate in self.certificates])),
            ("issuer", pack_array([pack_bin(certificate) for certificate in self.issuer])),
        )

    def fields(self) -> list[tuple[str, bytes]]:
        return self._with_alterations(
            ("permanent", pack_bin(self.permanent.value)),
            ("volatile", NIL if self.volatile is None else pack_bin(self.volatile.value)),
            ("policy", pack_map(self.policy())),
            ("endorsement", pack_map(self.endorsement())),
            ("label", pack_str(self.label.encode())),
        )

    def _with_alterations(self, *pairs: tuple[str, bytes]) -> list[tuple[str, bytes]]:
        altered = [(key, self.altered.get(key, value)) for key, value in pairs]
        return [(key, value) for key, value in altered if value is not None]

    def packed(self) -> bytes:
        return pack_map(self.fields())


@dataclass(frozen=True)
class File:
    """An instance file, field by field, so that each of them can be made wrong while all tags are right."""

    content: Content | bytes = Content()
    hibernated: bool = False
    user_secret: bytes = constant("user secret", 32)
    sp_secret: bytes = constant("sp secret", 32)
    vtpm_id: bytes = constant("vtpm id", 16)
    vm_id: bytes = constant("vm id", 16)
    fleet_id: bytes = constant("fleet id", 16)
    instance_version: int = 7
    created: int = 1_750_000_000
    generation: int = 3
    salt: bytes = constant("salt", 32)
    magic: bytes = b"SPVTPMIF"
    format_version: int = 1
    reserved_flags: int = 0
    reserved: int = 0
    announced: int | None = None
    named_check: bytes | None = None
    first_chunk: int = 0
    last_bytes: tuple[int, ...] | None = None

    def keys(self) -> tuple[bytes, bytes, bytes]:
        """Section "Keys": header key, payload key, key-check value."""
        secrets = b"\x00\x20" + self.user_secret + b"\x00\x20" + self.sp_secret
        info = b"spvtpm instance file v1" + self.vtpm_id + self.fleet_id + self.generation.to_bytes(4, "big")
        keys = _hkdf(secrets, self.salt, info, 96)
        return keys[:32], keys[32:64], keys[64:]

    def packed(self) -> bytes:
        """The content."""
        return self.content if isinstance(self.content, bytes) else self.content.packed()

    def header(self) -> bytes:
        """Section "Header", 184 bytes."""
        header_key, _payload_key, check = self.keys()
        header = bytearray(152)
        header[0:8] = self.magic
        header[8:10] = self.format_version.to_bytes(2, "big")
        header[10:12] = (self.reserved_flags | self.hibernated).to_bytes(2, "big")
        header[12:16] = (len(self.packed()) if self.announced is None else self.announced).to_bytes(4, "big")
        header[16:32] = self.vtpm_id
        header[32:48] = self.vm_id
        header[48:64] = self.fleet_id
        header[64:72] = self.instance_version.to_bytes(8, "big")
        header[72:80] = self.created.to_bytes(8, "big")
        header[80:84] = self.generation.to_bytes(4, "big")
        header[84:88] = self.reserved.to_bytes(4, "big")
        header[88:120] = self.salt
        header[120:152] = check if self.named_check is None else self.named_check
        return bytes(header) + hmac.digest(header_key, header, "sha256")

    def sealed(self) -> bytes:
        """Header and body."""
        header, cipher, content = self.header(), AESGCM(self.keys()[1]), self.packed()
        chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
        last_bytes = self.last_bytes or [int(number == len(chunks) - 1) for number in range(len(chunks))]
        associated = hashlib.sha256(header).digest()
        return header + b"".join(
            cipher.encrypt((self.first_chunk + number).to_bytes(11, "big") + bytes([last]), chunk, associated)
            for number, (chunk, last) in enumerate(zip(chunks, last_bytes, strict=True))
        )
