"""What a hypervisor asks of an emulated VM's machine: one request and one answer at a time, on the machine's control socket.

In the machine's directory lie `control.sock`, for this, `console.sock`, on which its owner's console comes in (`console.py`),
`image`, the sealed memory of a suspended one, and `copy`, records of the memory of one that moves (`memory_records.py`). Frames
are those of `framing.py`.

Format: docs/formats/machine-control.md.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from spvtpm.wire.memory_records import HANDOFF_BYTES, MAX_PAGES, MAX_ROUND_BYTES, STOP_NONCE_BYTES
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.versioned import VersionedDecoder, encode_versioned

VERSION: Final = 1

MAX_CONTROL_BYTES: Final = 4096

MachineStateName = Literal["running", "suspended", "halted", "off"]

HandoffId = Annotated[bytes, Meta(min_length=HANDOFF_BYTES, max_length=HANDOFF_BYTES)]
StopNonce = Annotated[bytes, Meta(min_length=STOP_NONCE_BYTES, max_length=STOP_NONCE_BYTES)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    pass


class AwaitReady(_Message, frozen=True):
    """Answers once the machine runs, or does not come up. → `MachineState`."""


class PowerOff(_Message, frozen=True):
    """Ends the machine in order; the answer comes before its process ends. → `MachineState`."""


class Suspend(_Message, frozen=True):
    """Nothing runs in it any more, and its memory is written to `image`, durably. → `MachineState`."""


class CopyMemory(_Message, frozen=True):
    """Writes to `copy` what has changed in its memory since it was asked last in this handoff. → `MemoryCopied`.

    Attributes:
        handoff_id: of the handoff; the first time, all of the memory has changed.
    """

    handoff_id: HandoffId


class Halt(_Message, frozen=True):
    """Nothing new runs in it; commands may end, then are ended; it lets go of its vTPM. → `MachineState`."""


class FinishCopy(_Message, frozen=True):
    """As `CopyMemory`, of a halted machine, with the final record; once in a handoff. → `MemoryCopied`.

    Attributes:
        handoff_id: of the handoff.
        stop_nonce: that its secure processor has made when the vTPM was stopped.
    """

    handoff_id: HandoffId
    stop_nonce: StopNonce


class GoOn(_Message, frozen=True):
    """A suspended or halted machine runs on, as if nothing had been. → `MachineState`."""


class MachineState(_Message, frozen=True):
    """How the machine is.

    Attributes:
        vm_id: whose it is.
        state: what it does.
    """

    vm_id: uuid.UUID
    state: MachineStateName


class MemoryCopied(_Message, frozen=True):
    """What `copy` holds.

    Attributes:
        vm_id: whose machine it is.
        records: so many.
        bytes: of all of them.
    """

    vm_id: uuid.UUID
    records: Annotated[int, Meta(ge=0, le=MAX_PAGES + 1)]
    bytes: Annotated[int, Meta(ge=0, le=MAX_ROUND_BYTES)]


ControlRequest = AwaitReady | PowerOff | Suspend | CopyMemory | Halt | FinishCopy | GoOn
ControlReply = MachineState | MemoryCopied | ErrorReply

_requests: VersionedDecoder[ControlRequest] = VersionedDecoder(VERSION, ControlRequest, " of a machine's control")
_replies: VersionedDecoder[ControlReply] = VersionedDecoder(VERSION, ControlReply, " of a machine's control")


def encode_control(message: ControlRequest | ControlReply) -> bytes:
    """The message as one frame's payload."""
    return encode_versioned(VERSION, message)


def parse_control_request(payload: bytes) -> ControlRequest:
    """What the hypervisor asks; hostile bytes.

    Raises:
        MessageError: it is no such message of this version.
    """
    return _requests.decode(payload)


def parse_control_reply(payload: bytes) -> ControlReply:
    """What the machine answers; hostile bytes.

    Raises:
        MessageError: it is no such message of this version.
    """
    return _replies.decode(payload)
