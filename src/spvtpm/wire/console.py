"""The console of a VM: its owner has commands run in it, over frames that platform and hypervisor carry and cannot read.

The channel is that of `channel.py`, with the VM as server. VM and owner share the VM key, and nobody else has it but the secure
processor; so the keys of both ends are derived from it, and each end takes exactly the certificate of the other's key:

    owner -> VM    Introduce     a self-signed certificate of the owner's end's key
    VM -> owner    Introduce     the same of the VM's end
    both           TLS records

    P-384 key of an end = 1 + (HKDF-SHA-384(VM key, salt = VM id, info = "spvtpm console " end " v1", 56 bytes) mod (n - 1))

One command a channel:

    owner -> VM    Run, then Input … EndOfInput, and Taken …
    VM -> owner    Output … and Taken …, then Ended or ErrorReply

How much may be on its way: `console_window.py`.

Source: HKDF: RFC 5869; why 64 bits more than the order n has: FIPS 186-5, appendix A.2.1. Format: docs/formats/console.md.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Final, Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID
from msgspec import Meta

from spvtpm.wire.certificate_building import build_self_signed
from spvtpm.wire.certificates import CONSOLE
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.owner_certificates import ALWAYS
from spvtpm.wire.versioned import VersionedDecoder, encode_versioned

VERSION: Final = 1

PIECE_BYTES: Final = 1 << 15
"""What a command reads and writes travels in pieces of at most this size."""

WINDOW_PIECES: Final = 64
"""So many pieces may be on their way, each way, that the other side has not said to be `Taken`: 2 MiB. An end keeps no more of
what is not taken; and a way of 100 ms there and back carries 20 MB/s. OpenSSH has as much for a session.
"""

MAX_CONSOLE_MESSAGE_BYTES: Final = 1 << 17

_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
"""n of P-384. Source: NIST SP 800-186, section 3.2.1.4."""

_SEED_BYTES: Final = 56

_NAME: Final = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "spvtpm console")])

End = Literal["owner", "vm"]
_Piece = Annotated[bytes, Meta(min_length=1, max_length=PIECE_BYTES)]
_Word = Annotated[str, Meta(max_length=4096, pattern=r"\A[^\x00]*\Z")]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    pass


class Run(_Message, frozen=True):
    """Run a command in the VM, in the VM's memory as its directory.

    Attributes:
        arguments: the program, which is looked up in PATH, and what it is told; 1 to 256 words.
    """

    arguments: Annotated[tuple[_Word, ...], Meta(min_length=1, max_length=256)]


class Input(_Message, frozen=True):
    """What the command reads next."""

    data: _Piece


class EndOfInput(_Message, frozen=True):
    """There is nothing more to read for the command."""


class Output(_Message, frozen=True):
    """What the command has written.

    Attributes:
        stream: where.
        data: what.
    """

    stream: Literal["stdout", "stderr"]
    data: _Piece


class Taken(_Message, frozen=True):
    """Pieces have been given on, in the order in which they came: to the command, or to whoever reads what it writes.

    Attributes:
        pieces: how many since the last `Taken`.
    """

    pieces: Annotated[int, Meta(ge=1, le=WINDOW_PIECES)]


class Ended(_Message, frozen=True):
    """The command has ended.

    Attributes:
        code: its exit code, 0 to 255; of one that a signal has ended, 128 and the signal's number, as shells have it.
    """

    code: Annotated[int, Meta(ge=0, le=255)]


ConsoleRequest = Run | Input | EndOfInput | Taken
ConsoleReply = Output | Taken | Ended | ErrorReply

_requests: VersionedDecoder[ConsoleRequest] = VersionedDecoder(VERSION, ConsoleRequest, " of the console")
_replies: VersionedDecoder[ConsoleReply] = VersionedDecoder(VERSION, ConsoleReply, " of the console")


def console_key(vm_key: bytes, vm_id: uuid.UUID, end: End) -> ec.EllipticCurvePrivateKey:
    """The key of one end of a VM's console.

    Args:
        vm_key: 32 bytes.
        vm_id: of the VM.
        end: whose.
    """
    hkdf = HKDF(SHA384(), _SEED_BYTES, salt=vm_id.bytes, info=f"spvtpm console {end} v1".encode())
    return ec.derive_private_key(1 + int.from_bytes(hkdf.derive(vm_key)) % (_ORDER - 1), ec.SECP384R1())


def build_console_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of the VM's end; the owner's end has one as any owner (`owner_certificates.py`).

    Args:
        key: the VM's end's.
    """
    return build_self_signed(CONSOLE, _NAME, key, ALWAYS)


def encode_console_message(message: ConsoleRequest | ConsoleReply) -> bytes:
    """The message as one payload."""
    return encode_versioned(VERSION, message)


def parse_console_request(payload: bytes) -> ConsoleRequest:
    """What the owner asks of the VM.

    Raises:
        MessageError: it is no such message of this version.
    """
    return _requests.decode(payload)


def parse_console_reply(payload: bytes) -> ConsoleReply:
    """What the VM answers; hostile bytes.

    Raises:
        MessageError: it is no such message of this version.
    """
    return _replies.decode(payload)
