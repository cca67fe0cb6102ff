"""What a hypervisor asks of an emulated VM's machine: one request and one answer at a time, on the machine's control socket.

In the machine's directory lie `control.sock`, for this, `console.sock`, on which its owner's console comes in (`console.py`), and
`image`, the sealed memory of a suspended one. Frames are those of `framing.py`.

Format: docs/formats/machine-control.md.
"""

from __future__ import annotations

import uuid
from typing import Final, Literal

import msgspec

from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.versioned import VersionedDecoder, encode_versioned

VERSION: Final = 1

MAX_CONTROL_BYTES: Final = 4096


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    pass


class AwaitReady(_Message, frozen=True):
    """Answers once the machine runs, or does not come up. → `MachineState`."""


class PowerOff(_Message, frozen=True):
    """Ends the machine in order; the answer comes before its process ends. → `MachineState`."""


class Suspend(_Message, frozen=True):
    """Nothing runs in it any more, and its memory is written to `image`, durably. → `MachineState`."""


class GoOn(_Message, frozen=True):
    """A suspended machine runs on, as if it had not been suspended. → `MachineState`."""


class MachineState(_Message, frozen=True):
    """How the machine is.

    Attributes:
        vm_id: whose it is.
        state: what it does.
    """

    vm_id: uuid.UUID
    state: Literal["running", "suspended", "off"]


ControlRequest = AwaitReady | PowerOff | Suspend | GoOn
ControlReply = MachineState | ErrorReply

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
