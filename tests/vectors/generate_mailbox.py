"""Writes the test vectors of the mailbox frame, from an implementation of its own.

Written against docs/formats/mailbox-frame.md and the `cryptography` package alone: it imports nothing of `spvtpm`, so an error in
the format's text, in the package, or here shows as a difference. Run it from the root of the repository:

    .venv/bin/python tests/vectors/generate_mailbox.py

All inputs are constants, so that the files come out the same every time. A file is text: comment lines that begin with `#`,
then lines `name: value`. `expect` is `ok`, or the code of the error that a reader must give; every other value is hexadecimal
(numbers big-endian, with leading zeros), and `direction` is `01` for a command and `02` for a response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

FOLDER = Path(__file__).parent / "mailbox"

OK = "ok"
REFUSED = "bad-mailbox-frame"
COMMAND, RESPONSE = 1, 2
COMMAND_ADDRESS, RESPONSE_ADDRESS, FREE_ADDRESS = 0x2000, 0x4000, 0x6000
GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")
RANDOM = bytes.fromhex("80010000001400000000") + bytes.fromhex("00088877665544332211")


def _constant(label: str, size: int) -> bytes:
    return hashlib.shake_256(f"spvtpm mailbox vector: {label}".encode()).digest(size)


def _hkdf(key: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    return HKDF(SHA256(), size, salt, info).derive(key)


@dataclass(frozen=True)
class Keys:
    """What VM and SP know of each other when the frame is opened, and the keys that follow from it."""

    vm_key: bytes = _constant("vm key", 32)
    vm_id: bytes = _constant("vm id", 16)
    boot_id: bytes = _constant("boot id", 16)
    sp_nonce: bytes = _constant("sp nonce", 32)
    vm_nonce: bytes = _constant("vm nonce", 32)

    def boot_key(self) -> bytes:
        """Section "Keys" of the format."""
        return _hkdf(self.vm_key, self.boot_id, b"spvtpm mailbox boot key v1" + self.vm_id, 32)

    def session_key(self, direction: int) -> bytes:
        """Section "Keys" of the format: the first half is for commands, the second for responses."""
        both = _hkdf(self.boot_key(), self.sp_nonce + self.vm_nonce, b"spvtpm mailbox session keys v1", 64)
        return both[:32] if direction == COMMAND else both[32:]


@dataclass(frozen=True)
class Frame:
    """A frame, field by field, so that each of them can be made wrong while the tag is right."""

    payload: bytes = GET_RANDOM
    direction: int = COMMAND
    sequence: int = 1
    address: int = COMMAND_ADDRESS
    magic: bytes = b"SPVM"
    version: int = 1
    flags: int = 0
    reserved: int = 0
    announced: int | None = None
    named_nonce: bytes | None = None

    def header(self, vm_nonce: bytes) -> bytes:
        """Section "Header" of the format, 64 bytes."""
        header = bytearray(64)
        header[0:4] = self.magic
        header[4] = self.version
        header[5] = self.direction
        header[6:8] = self.flags.to_bytes(2, "little")
        header[8:12] = (len(self.payload) if self.announced is None else self.announced).to_bytes(4, "little")
        header[12:16] = self.reserved.to_bytes(4, "little")
        header[16:24] = self.sequence.to_bytes(8, "little")
        header[24:32] = self.address.to_bytes(8, "little")
        header[32:64] = vm_nonce if self.named_nonce is None else self.named_nonce
        return bytes(header)

    def sealed(self, keys: Keys, key_of: int | None = None) -> bytes:
        """Header, ciphertext and tag; `key_of`: take the key of that direction instead of the frame's own."""
        header = self.header(keys.vm_nonce)
        cipher = AESGCM(keys.session_key(self.direction if key_of is None else key_of))
        return header + cipher.encrypt(bytes(4) + self.sequence.to_bytes(8, "big"), self.payload, header)


@dataclass(frozen=True)
class Vector:
    """One file: what lies where, who reads it with which knowledge, and what must come of it."""

    name: str
    shows: str
    expect: str
    frame: bytes
    keys: Keys = Keys()
    direction: int = COMMAND
    address: int = COMMAND_ADDRESS
    payload: bytes = b""
    sequence: int = 0

    def text(self) -> str:
        """The file's content."""
        keys = self.keys
        values = {
            "direction": f"{self.direction:02x}",
            "address": f"{self.address:016x}",
            "vm-key": keys.vm_key.hex(),
            "vm-id": keys.vm_id.hex(),
            "boot-id": keys.boot_id.hex(),
            "sp-nonce": keys.sp_nonce.hex(),
            "vm-nonce": keys.vm_nonce.hex(),
        }
        if self.expect == OK:
            values |= {
                "boot-key": keys.boot_key().hex(),
                "session-key": keys.session_key(self.direction).hex(),
                "sequence": f"{self.sequence:016x}",
                "payload": self.payload.hex(),
            }
        values["frame"] = self.frame.hex()
        lines = [f"# {self.shows}", f"expect: {self.expect}", *(f"{name}: {value}" for name, value in values.items())]
        return "\n".join(lines) + "\n"


def _good(name: str, shows: str, frame: Frame, behind: bytes = b"") -> Vector:
    return Vector(
        name,
        shows,
        OK,
        frame.sealed(Keys()) + behind,
        direction=frame.direction,
        address=frame.address,
        payload=frame.payload,
        sequence=frame.sequence,
    )


def _bad(name: str, shows: str, frame: Frame | bytes, keys: Keys | None = None, **reader: int) -> Vector:
    sealed = frame.sealed(Keys()) if isinstance(frame, Frame) else frame
    return Vector(name, shows, REFUSED, sealed, Keys() if keys is None else keys, **reader)  # type: ignore[arg-type]


def _flipped(frame: bytes, offset: int) -> bytes:
    altered = bytearray(frame)
    altered[offset] ^= 1
    return bytes(altered)


def vectors() -> Iterator[Vector]:
    """All vectors."""
    keys, plain = Keys(), Frame()
    whole = plain.sealed(keys)
    longest = bytes(range(256)) * 16
    response = Frame(RANDOM, RESPONSE, 1, RESPONSE_ADDRESS)

    yield _good("ok-command", "TPM2_GetRandom from the VM: the first frame of a session.", plain)
    yield _good(
        "ok-response", "Its response from the SP: the same sequence, the other key, the other address.", response
    )
    yield _good(
        "ok-later-sequence", "Sequences may leave gaps; this one uses more than 32 bits.", Frame(sequence=0x1_0000_0002)
    )
    yield _good("ok-last-sequence", "The largest sequence, 2^63 - 1.", Frame(sequence=(1 << 63) - 1))
    yield _good("ok-one-byte", "The shortest payload, one byte.", Frame(b"\x80"))
    yield _good("ok-longest", "The longest payload, 4,096 bytes.", Frame(longest))
    yield _good(
        "ok-elsewhere", "A frame that lies where the VM pointed the command address to.", Frame(address=FREE_ADDRESS)
    )
    yield _good(
        "ok-bytes-behind", "What lies in memory behind the frame does not belong to it.", plain, _constant("rest", 48)
    )

    yield _bad("bad-tag", "The last bit of the tag is flipped.", _flipped(whole, len(whole) - 1))
    yield _bad("bad-ciphertext", "A bit of the ciphertext is flipped.", _flipped(whole, 64))
    yield _bad("bad-nonce-altered", "A bit of the VM nonce in the header is flipped.", _flipped(whole, 32))
    yield _bad("bad-sequence-altered", "The header's sequence was raised from 1 to 2 on the way.", _renumbered(whole))
    yield _bad("bad-direction", "A genuine response where a command must lie.", response, address=RESPONSE_ADDRESS)
    yield _bad(
        "bad-direction-key",
        "The header says command, but the response key sealed it: a response made to look like a command.",
        plain.sealed(keys, key_of=RESPONSE),
    )
    yield _bad(
        "bad-direction-unknown",
        "Direction 3 does not exist; the tag is right.",
        Frame(direction=3).sealed(keys, COMMAND),
    )
    yield _bad("bad-address", "A genuine frame copied to another address.", plain, address=FREE_ADDRESS)
    yield _bad(
        "bad-address-altered",
        "The same, with the header's address altered to where the frame lies now.",
        plain.header(keys.vm_nonce)[:24] + FREE_ADDRESS.to_bytes(8, "little") + whole[32:],
        address=FREE_ADDRESS,
    )
    yield _bad(
        "bad-vm-key", "The reader has another VM key.", whole, replace(keys, vm_key=_constant("other vm key", 32))
    )
    yield _bad("bad-vm", "The frame of another VM that has the same VM key.", whole, replace(keys, vm_id=bytes(16)))
    yield _bad("bad-boot", "The frame of an earlier boot.", whole, replace(keys, boot_id=bytes(16)))
    yield _bad(
        "bad-sp-nonce", "The frame of a session whose SP nonce is spent.", whole, replace(keys, sp_nonce=bytes(32))
    )
    yield _bad("bad-session", "The reader's session has another VM nonce.", whole, replace(keys, vm_nonce=bytes(32)))
    yield _bad("bad-sequence-zero", "Sequence 0 is never used; the tag is right.", Frame(sequence=0))
    yield _bad("bad-sequence-too-large", "Sequence 2^63; the tag is right.", Frame(sequence=1 << 63))
    yield _bad("bad-magic", "Another magic; the tag is right.", Frame(magic=b"SPVN"))
    yield _bad("bad-version", "Version 2; the tag is right.", Frame(version=2))
    yield _bad("bad-flags", "A bit set at offset 6, where all are reserved; the tag is right.", Frame(flags=0x0100))
    yield _bad("bad-reserved", "A bit set at offset 12, where all are reserved; the tag is right.", Frame(reserved=1))
    yield _bad("bad-empty", "A payload of no bytes; the tag is right.", Frame(b""))
    yield _bad(
        "bad-too-long", "A payload of 4,097 bytes, one beyond the bound; the tag is right.", Frame(longest + b"\x00")
    )
    yield _bad("bad-length-huge", "The header announces 4 GiB - 1.", Frame(announced=0xFFFF_FFFF))
    yield _bad(
        "bad-length-altered",
        "The header announces one byte less than was sealed.",
        Frame(announced=len(GET_RANDOM) - 1),
    )
    yield _bad("bad-truncated", "The last byte is missing.", whole[:-1])
    yield _bad(
        "bad-header-alone", "The first 80 bytes alone: no room for the payload that the header announces.", whole[:80]
    )
    yield _bad("bad-header-cut", "The memory ends inside the header.", whole[:63])
    yield _bad("bad-nothing", "No frame was ever written there: 4,176 zero bytes.", bytes(4176))


def _renumbered(whole: bytes) -> bytes:
    return whole[:16] + (2).to_bytes(8, "little") + whole[24:]


def main() -> None:
    """Writes the files anew."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for vector in vectors():
        (FOLDER / f"{vector.name}.txt").write_text(vector.text())


if __name__ == "__main__":
    main()
