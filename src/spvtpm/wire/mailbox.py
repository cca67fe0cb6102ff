"""A request or response in VM memory: one AEAD frame, bound to VM, boot, session, direction, address and sequence.

Keys. The VM key is shared by the VM and the SP. A boot key is derived from it for every power-on; the keys of a session
(one attachment of one client inside the VM) from the boot key and a nonce of each side, so neither side can be made to
reuse a key: whatever the memory's owner writes back, at least one nonce is new.

    boot key              = HKDF-SHA-256(VM key, salt = boot id, info = "spvtpm mailbox boot key v1" || VM id)
    command, response key = HKDF-SHA-256(boot key, salt = SP nonce || VM nonce, info = "spvtpm mailbox session keys v1")

Frame, little-endian: 64-byte header (the associated data), ciphertext, 16-byte tag; AES-256-GCM, nonce = sequence
(64 bits, big-endian) behind 32 zero bits. A sequence is used once per key and grows strictly; a response carries the
sequence of the command that it answers.

The code is `mailbox.h`, which both ends of the memory compile in; this is the same code for Python.

Source: the shape follows the guest messages of AMD SEV-SNP (firmware ABI specification, "Guest messages"); AES-GCM:
NIST SP 800-38D; HKDF: RFC 5869.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from spvtpm.wire._mailbox import ffi, lib
from spvtpm.wire.errors import MailboxError

KEY_BYTES: Final[int] = lib.MAILBOX_KEY_BYTES
NONCE_BYTES: Final[int] = lib.MAILBOX_NONCE_BYTES
VM_ID_BYTES: Final[int] = lib.MAILBOX_ID_BYTES
BOOT_ID_BYTES: Final[int] = lib.MAILBOX_ID_BYTES
MAX_PAYLOAD_BYTES: Final[int] = lib.MAILBOX_MAX_PAYLOAD_BYTES
"""Longest TPM command or response. Source: libtpms, TPM_BUFFER_MAX."""

HEADER_BYTES: Final[int] = lib.MAILBOX_HEADER_BYTES
OVERHEAD_BYTES: Final[int] = lib.MAILBOX_OVERHEAD_BYTES
MAX_FRAME_BYTES: Final[int] = lib.MAILBOX_MAX_FRAME_BYTES
MAX_SEQUENCE: Final[int] = lib.MAILBOX_MAX_SEQUENCE

_SENTENCES = {
    lib.MAILBOX_NO_ROOM: f"no room for a frame: at least {OVERHEAD_BYTES} bytes are needed",
    lib.MAILBOX_NO_FRAME: "no frame of this version and direction lies at the address",
    lib.MAILBOX_BAD_SEQUENCE: "the frame's sequence is out of range",
    lib.MAILBOX_BAD_SIZE: "the frame announces no bytes, or more than there is room for",
    lib.MAILBOX_OTHER_PLACE: "the frame was made for another address or session",
    lib.MAILBOX_NOT_AUTHENTIC: "the frame is not authentic for this VM, boot, session, direction and address",
    lib.MAILBOX_CRYPTO_FAILED: "OpenSSL failed",
}


class Direction(IntEnum):
    """Who wrote the frame."""

    COMMAND = lib.MAILBOX_COMMAND
    RESPONSE = lib.MAILBOX_RESPONSE


class FrameHeader(NamedTuple):
    """A frame's clear header after `parse_header`; nothing in it is believed before the tag is checked."""

    payload_bytes: int
    sequence: int
    address: int
    vm_nonce: bytes


def check_result(result: int) -> None:
    """Raises for what `mailbox.h` does not call right.

    Raises:
        MailboxError: says what is wrong with the frame.
    """
    if result != lib.MAILBOX_OK:
        raise MailboxError(_SENTENCES[result])


def derive_boot_key(vm_key: bytes, vm_id: bytes, boot_id: bytes) -> bytes:
    """The 32-byte key of one boot of one VM.

    Args:
        vm_key: 32 bytes.
        vm_id: 16 bytes.
        boot_id: 16 bytes.
    """
    _check_sizes((vm_key, KEY_BYTES), (vm_id, VM_ID_BYTES), (boot_id, BOOT_ID_BYTES))
    boot_key = ffi.new("uint8_t[]", KEY_BYTES)
    if not lib.mailbox_derive_boot_key(vm_key, vm_id, boot_id, boot_key):
        raise MailboxError(_SENTENCES[lib.MAILBOX_CRYPTO_FAILED])
    return bytes(ffi.buffer(boot_key))


def derive_session(boot_key: bytes, sp_nonce: bytes, vm_nonce: bytes) -> Session:
    """The session in which the SP contributed `sp_nonce` and the VM `vm_nonce` (32 bytes each)."""
    return Session(boot_key, sp_nonce, vm_nonce)


def parse_header(frame: bytes, direction: Direction) -> FrameHeader:
    """Reads a frame's header and checks its bounds.

    Args:
        frame: this side's own copy of the memory, at least as long as the frame.
        direction: the direction the frame must have.

    Raises:
        MailboxError: no frame, another version or direction, reserved bits set, empty, too long, or cut off.
    """
    header = ffi.new("struct mailbox_header *")
    check_result(lib.mailbox_parse(frame, len(frame), direction, header))
    return FrameHeader(header.payload_bytes, header.sequence, header.address, bytes(ffi.buffer(header.vm_nonce)))


def _check_sizes(*fields: tuple[bytes, int]) -> None:
    for content, size in fields:
        if len(content) != size:
            raise ValueError(f"{len(content)} bytes where {size} belong")


class Session:
    """Both directions of one session: seals and opens frames. Knows no sequence rules but those of the tag.

    Args:
        boot_key: 32 bytes.
        sp_nonce: 32 bytes.
        vm_nonce: 32 bytes; names the session in every header.
    """

    __slots__ = ("_session", "vm_nonce")

    def __init__(self, boot_key: bytes, sp_nonce: bytes, vm_nonce: bytes) -> None:
        _check_sizes((boot_key, KEY_BYTES), (sp_nonce, NONCE_BYTES), (vm_nonce, NONCE_BYTES))
        session = ffi.new("struct mailbox_session *")
        if not lib.mailbox_session_derive(session, boot_key, sp_nonce, vm_nonce):
            raise MailboxError(_SENTENCES[lib.MAILBOX_CRYPTO_FAILED])
        self._session = ffi.gc(session, lib.mailbox_session_close)
        self.vm_nonce = vm_nonce

    @property
    def address(self) -> int:
        """Where the `struct mailbox_session` lies, for compiled code; it lives as long as this object."""
        return int(ffi.cast("uintptr_t", self._session))

    def seal(self, direction: Direction, sequence: int, address: int, payload: bytes) -> bytes:
        """The frame that carries `payload`. The caller never uses a sequence twice in one direction.

        Args:
            direction: who sends.
            sequence: 1 to `MAX_SEQUENCE`.
            address: where in the shared memory the frame will lie.
            payload: 1 to 4,096 bytes.
        """
        frame = ffi.new("uint8_t[]", OVERHEAD_BYTES + len(payload))
        check_result(lib.mailbox_seal(self._session, direction, sequence, address, payload, len(payload), frame))
        return bytes(ffi.buffer(frame))

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
        if len(frame) < OVERHEAD_BYTES + header.payload_bytes:
            check_result(lib.MAILBOX_BAD_SIZE)
        payload = ffi.new("uint8_t[]", header.payload_bytes)
        parsed = ffi.new("struct mailbox_header *", header._asdict())
        check_result(lib.mailbox_open(self._session, direction, parsed, address, frame, payload))
        return bytes(ffi.buffer(payload))
