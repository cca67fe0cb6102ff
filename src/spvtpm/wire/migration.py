"""What two secure processors say to each other while a vTPM moves, and what is said at a secure processor's migration socket.

Whoever connects to the socket says first what for, in a frame of its own:

    Link        the way to the other secure processor, by relays that carry frames and read nothing
    MemoryIn    source: records of the VM's memory come (`memory_records.py`), a frame each
    MemoryOut   destination: the same records go out

On a link, both sides show in clear who they are; then it is a confidential channel (`channel.py`), the source as client:

    source                                   destination
    Meet           in clear             ->
                                        <-   Meet          in clear
    TLS records                        <->   TLS records
    records of memory                   ->
    Vtpm           whole                ->
                                        <-   Prepared      durable, loaded, not running
    Commit         the token            ->

    Abort          the token, at any time before Commit

In the channel, a message is a byte that tells its kind, then the record or MessagePack. Source: docs/formats/migration.md.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from spvtpm.wire.instance_header import MAX_PERMANENT_BYTES, MAX_VOLATILE_BYTES
from spvtpm.wire.messages import ErrorReply, HandoffId, Token
from spvtpm.wire.versioned import VersionedDecoder, encode_versioned
from spvtpm.wire.vtpm_endorsement import DerCertificate, VtpmEndorsement

VERSION: Final = 1

MAX_LIST_BYTES: Final = 48 << 10
"""The longest revocation list that fits in a frame besides a chain."""

MAX_PEER_MESSAGE_BYTES: Final = MAX_PERMANENT_BYTES + MAX_VOLATILE_BYTES + (1 << 17)
"""The longest message in a link's channel: a vTPM, and what is around it."""

_Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_RevocationList = Annotated[bytes, Meta(max_length=MAX_LIST_BYTES)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    pass


class Link(_Message, frozen=True):
    """The connection leads to the other secure processor.

    Attributes:
        handoff: which one it is for.
        revoked: the vendor's newest list of revoked chips, DER; empty: as is known here.
    """

    handoff: HandoffId
    revoked: _RevocationList = b""


class MemoryIn(_Message, frozen=True):
    """Memory of a VM comes, from its driver."""

    handoff: HandoffId


class MemoryOut(_Message, frozen=True):
    """Memory of a VM goes out, to its driver; the connection ends behind the last record."""

    handoff: HandoffId


class Meet(_Message, frozen=True):
    """Who is at this end of a link. Believed by nobody until TLS has shown it.

    Attributes:
        handoff: for which one.
        chain: channel certificate, chip EK, the vendor's intermediate, the vendor's root; DER.
        revoked: the newest list of revoked chips that is known here, DER; empty: none.
    """

    handoff: HandoffId
    chain: tuple[DerCertificate, DerCertificate, DerCertificate, DerCertificate]
    revoked: _RevocationList = b""


class Vtpm(_Message, frozen=True):
    """A vTPM, whole, and the part of its VM's security block that moves. Its `repr` shows nothing of it.

    Attributes:
        handoff: in which it moves.
        vm_id: the VM.
        block: the block's part (`processor/security_block.py`); opaque here.
        permanent: its permanent state.
        volatile: its volatile state.
        endorsement: certificates of its EKs.
        stop_nonce: 32 bytes, made when the vTPM was stopped; the memory's final record depends on it.
        commit_sha256: of the token on which it may be run.
        abort_sha256: of the token on which it is to be thrown away.
    """

    handoff: HandoffId
    vm_id: uuid.UUID
    block: Annotated[bytes, Meta(max_length=1 << 16)]
    permanent: Annotated[bytes, Meta(min_length=1, max_length=MAX_PERMANENT_BYTES)]
    volatile: Annotated[bytes, Meta(min_length=1, max_length=MAX_VOLATILE_BYTES)]
    endorsement: VtpmEndorsement
    stop_nonce: _Sha256
    commit_sha256: _Sha256
    abort_sha256: _Sha256

    def __repr__(self) -> str:
        return f"Vtpm(handoff={self.handoff.hex()})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("handoff", self.handoff.hex())]


class Prepared(_Message, frozen=True):
    """All is here, durably, and nothing runs.

    Attributes:
        receipt_sha256: of the token that will tell that it runs.
    """

    receipt_sha256: _Sha256


class Commit(_Message, frozen=True):
    """The source has given the vTPM up."""

    token: Token


class Abort(_Message, frozen=True):
    """The source keeps the vTPM."""

    token: Token


Opening = Link | MemoryIn | MemoryOut
PeerMessage = Vtpm | Prepared | Commit | Abort | ErrorReply

_openings: VersionedDecoder[Opening] = VersionedDecoder(VERSION, Opening, " of the migration socket")
_meetings: VersionedDecoder[Meet | ErrorReply] = VersionedDecoder(VERSION, Meet | ErrorReply, " of migration")
_peers: VersionedDecoder[PeerMessage] = VersionedDecoder(
    VERSION, PeerMessage, " of migration", "it is no message between secure processors"
)


def encode_migration(message: Opening | Meet | PeerMessage) -> bytes:
    """The message as one frame's payload, or as a message in the channel."""
    return encode_versioned(VERSION, message)


def parse_opening(payload: bytes) -> Opening:
    """What a connection is for; hostile bytes.

    Raises:
        MessageError: it is no such message of this version.
    """
    return _openings.decode(payload)


def parse_meeting(payload: bytes) -> Meet | ErrorReply:
    """Who says to be at the other end; hostile bytes.

    Raises:
        MessageError: it is no such message of this version.
    """
    return _meetings.decode(payload)


def parse_peer_message(payload: bytes) -> PeerMessage:
    """What the other secure processor says; hostile bytes.

    Raises:
        MessageError: it is no such message of this version.
    """
    return _peers.decode(payload)
