"""What the SP and one worker say to each other, over a socket pair that nobody else holds.

A worker is not believed: it may have been taken over by its guest. It can speak about its own vTPM only, because the
socket, not a field, says which one it is.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from spvtpm.wire.decoding import UNDECODABLE, in_words
from spvtpm.wire.errors import MessageError
from spvtpm.wire.vtpm_endorsement import MAX_ENDORSEMENTS, DerCertificate

MAX_PERMANENT_BYTES = 256 * 1024
"""Bound of a permanent state. libtpms: 128 KiB + 65 * 704 bytes of NV memory, plus its header (TpmProfile_Misc.h)."""

MAX_VOLATILE_BYTES = 64 * 1024
"""Bound of a volatile state; about 10 KiB with all session slots in use."""

Line = Annotated[str, Meta(max_length=1024, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
"""A sentence for the log, on one line."""

Permanent = Annotated[bytes, Meta(min_length=1, max_length=MAX_PERMANENT_BYTES)]
Volatile = Annotated[bytes, Meta(min_length=1, max_length=MAX_VOLATILE_BYTES)]
PcrBank = Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,16}\Z")]
Public = Annotated[bytes, Meta(min_length=1, max_length=512)]
"""A TPMT_PUBLIC; that of an RSA-2048 key has some 300 bytes."""

Word = Annotated[int, Meta(ge=0, lt=1 << 32)]
Id16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Key32 = Annotated[bytes, Meta(min_length=32, max_length=32)]


class InterfaceSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must outlive parking so that a replayed frame is refused after waking too. Secret: holds session keys.

    Attributes:
        state: name of the `CrbState`.
        granted: whether locality 0 is granted.
        error: the `AttachError` last shown.
        sp_nonce: 32 bytes offered for the next session.
        sequence: the last sequence executed; 0 when there is no session.
        session: command key, response key and VM nonce of the session, if there is one.
    """

    state: Literal["IDLE", "READY", "COMPLETION"]
    granted: bool
    error: Annotated[int, Meta(ge=0, le=255)]
    sp_nonce: Key32
    sequence: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    session: tuple[Key32, Key32, Key32] | None


class DirectPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Serve the CRB interface in shared memory. Descriptors: memory, SP doorbell, VM doorbell.

    Attributes:
        vm_id: 16 bytes.
        boot_id: 16 bytes.
        boot_key: 32 bytes.
        snapshot: the interface as it was parked; none at power-on.
    """

    vm_id: Id16
    boot_id: Id16
    boot_key: Key32
    snapshot: InterfaceSnapshot | None = None


class PacketPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Serve plain commands, one a packet, over a socket pair of the process that embeds the vTPM. Descriptor: the socket."""


class StreamPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Serve plain commands on a byte stream, the data channel of a TPM emulator. Descriptors: its socket, and one on which a byte
    cancels the running command; none to serve nobody.

    Attributes:
        buffer_bytes: of the TPM's buffers, if it is powered on for this port.
    """

    buffer_bytes: Annotated[int, Meta(ge=1, le=4096)] = 4096


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The first message to a worker: which TPM to be.

    Attributes:
        port: where commands come from.
        permanent: the TPM's permanent state, authenticated by the SP; none: the new TPM that the worker has made, or makes.
        volatile: its volatile state as `Parked` gave it; none is a power-on.
        pcr_banks: names of those that a new TPM is to have; none: as it is manufactured.
        reseed: other copies of this state may run, as of one that was hibernated: no random number may be drawn twice.
        has_shut_down: as `Parked` gave it.
    """

    port: DirectPort | PacketPort | StreamPort
    permanent: Permanent | None = None
    volatile: Volatile | None = None
    pcr_banks: Annotated[list[PcrBank], Meta(max_length=16)] = []
    reseed: bool = False
    has_shut_down: bool = False


class Endorsed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Answer to `Endorse`.

    Attributes:
        certificates: of the keys, DER, in the same order.
        issuer: the chip's chain.
    """

    certificates: Annotated[list[DerCertificate], Meta(max_length=MAX_ENDORSEMENTS)]
    issuer: tuple[DerCertificate, DerCertificate, DerCertificate]


class Committed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Answer to `Commit`: the state is durable, or the reason (a public sentence) why it is not."""

    failure: str | None = None


class Park(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Take the state out and end.

    Attributes:
        only_if_idle: do nothing when a command has been executed since the last `Park` with this flag.
    """

    only_if_idle: bool = False


class PowerOff(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Shut the TPM down in order (TPM2_Shutdown) and end."""


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The worker waits until this permanent state is durable."""

    permanent: Permanent


class Endorse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The public keys that a worker has just derived in its new TPM; its first words, long before any guest's.

    Attributes:
        publics: TPMT_PUBLIC of each standard EK, in the order of the templates.
        manufacturer, firmware, level, revision: which TPM it is (TPM_PT_*).
    """

    publics: Annotated[list[Public], Meta(max_length=MAX_ENDORSEMENTS)]
    manufacturer: Word
    firmware: Word
    level: Word
    revision: Word


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The TPM runs and its interface is served.

    Attributes:
        missing: sentences naming each sandbox layer that this kernel does not give.
    """

    missing: Annotated[list[Line], Meta(max_length=16)] = []


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A frame in VM memory was refused; sent at counts 1, 2, 4, 8, … so that a flood stays quiet.

    Attributes:
        error: the `AttachError`.
        count: refused frames of all kinds since power-on or waking.
    """

    error: Annotated[int, Meta(ge=0, le=255)]
    count: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


class StillBusy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Answer to `Park` with `only_if_idle`: the vTPM has worked, or an NV change waits to become durable."""


class Parked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Answer to `Park`; the worker's last words.

    Attributes:
        volatile: the TPM's volatile state, packed; it fits the permanent state that was committed last.
        snapshot: the interface.
        has_shut_down: whether the guest's last command was an orderly shutdown: it sleeps, or has ended.
    """

    volatile: Volatile
    snapshot: InterfaceSnapshot | None
    has_shut_down: bool = False


class Off(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Answer to `PowerOff`; the worker's last words. Everything is durable."""


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The worker's last words when it cannot go on.

    Attributes:
        reason: a public sentence.
    """

    reason: Line


ToWorker = Start | Endorsed | Committed | Park | PowerOff
FromWorker = Endorse | Commit | Ready | Refused | StillBusy | Parked | Off | Failed

_Message = TypeVar("_Message")
_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """The message as one frame's payload."""
    return _encoder.encode(message)


def _parse(decoder: msgspec.msgpack.Decoder[_Message], payload: bytes) -> _Message:
    try:
        return decoder.decode(payload)
    except UNDECODABLE as error:
        raise MessageError(f"no message between SP and worker: {in_words(error)}") from None


def parse_to_worker(payload: bytes) -> ToWorker:
    """What the SP says.

    Raises:
        MessageError: it is no such message, or out of bounds.
    """
    return _parse(_to_worker, payload)


def parse_from_worker(payload: bytes) -> FromWorker:
    """What a worker says; hostile bytes.

    Raises:
        MessageError: it is no such message, or out of bounds.
    """
    return _parse(_from_worker, payload)
