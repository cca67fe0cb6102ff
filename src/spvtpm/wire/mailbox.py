"""A request or response in VM memory: one AEAD frame, bound to VM, boot, session, direction, address and sequence.

Keys. The VM key is shared by the VM and the SP. A boot key is derived from it for every power-on; the keys of a session
(one attachment of one client inside the VM) from the boot key and a nonce of each side, so neither side can be made to
reuse a key: whatever the memory's owner writes back, at least one nonce is new.

    boot key              = HKDF-SHA-256(VM key, salt = boot id, info = "spvtpm mailbox boot key v1" || VM id)
    command, response key = HKDF-SHA-256(boot key, salt = SP nonce || VM nonce, info = "spvtpm mailbox session keys v1")

Frame, little-endian: 64-byte header (the associated data), ciphertext, 16-byte tag; AES-256-GCM, nonce = sequence
(64 bits, big-endian) behind 32 zero bits. A sequence is used once per key and grows strictly; a response carries the
sequence of the command that it answers.

Source: the shape follows the guest messages of AMD SEV-SNP (firmware ABI specification, "Guest messages"); AES-GCM:
NIST SP 800-38D; HKDF: RFC 5869.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.wire.errors import MailboxError

KEY_BYTES = 32
NONCE_BYTES = 32
VM_ID_BYTES = 16
BOOT_ID_BYTES = 16
MAX_PAYLOAD_BYTES = 4096
"""Longest TPM command or response. Source: libtpms, TPM_BUFFER_MAX."""

_HEADER = struct.Struct("<4sBBHIIQQ32s")
_MAGIC = b"SPVM"
_VERSION = 1
_TAG_BYTES = 16
HEADER_BYTES = _HEADER.size
OVERHEAD_BYTES = HEADER_BYTES + _TAG_BYTES
MAX_FRAME_BYTES = OVERHEAD_BYTES + MAX_PAYLOAD_BYTES
MAX_SEQUENCE = (1 << 63) - 1

_AEAD_NONCE = struct.Struct(">4xQ")


class Direction(IntEnum):
    """Who wrote the frame."""

    COMMAND = 1
    RESPONSE = 2


class FrameHeader(NamedTuple):
    """A frame's clear header after `parse_header`; nothing in it is believed before the tag is checked."""

    payload_bytes: int
    sequence: int
    address: int
    vm_nonce: bytes


def derive_boot_key(vm_key: bytes, vm_id: bytes, boot_id: bytes) -> bytes:
    """The 32-byte key of one boot of one VM.

    Args:
        vm_key: 32 bytes.
        vm_id: 16 bytes.
        boot_id: 16 bytes.
    """
    info = b"spvtpm mailbox boot key v1" + vm_id
    return HKDF(SHA256(), KEY_BYTES, boot_id, info).derive(vm_key)


def derive_session(boot_key: bytes, sp_nonce: bytes, vm_nonce: bytes) -> Session:
    """The session in which the SP contributed `sp_nonce` and the VM `vm_nonce` (32 bytes each)."""
    material = HKDF(SHA256(), 2 * KEY_BYTES, sp_nonce + vm_nonce, b"spvtpm mailbox session keys v1").derive(boot_key)
    return Session(material[:KEY_BYTES], material[KEY_BYTES:], vm_nonce)


def parse_header(frame: bytes, direction: Direction) -> FrameHeader:
    """Reads a frame's header and checks its bounds.

    Args:
        frame: this side's own copy of the memory, at least as long as the frame.
        direction: the direction the frame must have.

    Raises:
        MailboxError: no frame, another version or direction, reserved bits set, empty, too long, or cut off.
    """
    if len(frame) < OVERHEAD_BYTES:
        raise MailboxError(f"no room for a frame: {len(frame)} bytes, at least {OVERHEAD_BYTES} are needed")
    magic, version, way, flags, payload_bytes, reserved, sequence, address, vm_nonce = _HEADER.unpack_from(frame)
    if magic != _MAGIC or version != _VERSION or way != direction or flags or reserved:
        raise MailboxError("no frame of this version and direction lies at the address")
    if not 0 < sequence <= MAX_SEQUENCE:
        raise MailboxError("the frame's sequence is out of range")
    if not 0 < payload_bytes <= MAX_PAYLOAD_BYTES or OVERHEAD_BYTES + payload_bytes > len(frame):
        raise MailboxError(f"the frame announces {payload_bytes} bytes, more than there is room for")
    return FrameHeader(payload_bytes, sequence, address, vm_nonce)


class Session:
    """Both directions of one session: seals and opens frames. Knows no sequence rules but those of the tag.

    Args:
        command_key: 32 bytes, for frames from the VM.
        response_key: 32 bytes, for frames from the SP.
        vm_nonce: 32 bytes; names the session in every header.
    """

    __slots__ = ("_ciphers", "_keys", "vm_nonce")

    def __init__(self, command_key: bytes, response_key: bytes, vm_nonce: bytes) -> None:
        self._keys = (command_key, response_key)
        self._ciphers = {Direction.COMMAND: AESGCM(command_key), Direction.RESPONSE: AESGCM(response_key)}
        self.vm_nonce = vm_nonce

    def dangerous_keys(self) -> tuple[bytes, bytes]:
        """Command and response key, for the sealed state of a parked vTPM and nothing else."""
        return self._keys

    def seal(self, direction: Direction, sequence: int, address: int, payload: bytes) -> bytes:
        """The frame that carries `payload`. The caller never uses a sequence twice in one direction.

        Args:
            direction: who sends.
            sequence: 1 to `MAX_SEQUENCE`.
            address: where in the shared memory the frame will lie.
            payload: 1 to 4,096 bytes.
        """
        header = _HEADER.pack(_MAGIC, _VERSION, direction, 0, len(payload), 0, sequence, address, self.vm_nonce)
        return header + self._ciphers[direction].encrypt(_AEAD_NONCE.pack(sequence), payload, header)

    def open(self, direction: Direction, header: FrameHeader, address: int, frame: bytes) -> bytes:
        """The payload of a frame whose header was parsed from the same copy.

        Args:
            direction: who must have sent it.
            header: `parse_header(frame, direction)`.
            address: where the frame lay.
            frame: the copy.

        Raises:
            MailboxError: the tag is wrong: forged, altered, or of another VM, boot, session, direction or address.
        """
        if header.address != address or header.vm_nonce != self.vm_nonce:
            raise MailboxError("the frame was made for another address or session")
        sealed = frame[HEADER_BYTES : OVERHEAD_BYTES + header.payload_bytes]
        try:
            nonce = _AEAD_NONCE.pack(header.sequence)
            return self._ciphers[direction].decrypt(nonce, sealed, frame[:HEADER_BYTES])
        except InvalidTag:
            raise MailboxError("the frame is not authentic for this VM, boot, session, direction and address") from None
