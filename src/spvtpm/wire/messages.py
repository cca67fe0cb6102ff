"""What a hypervisor may ask of its secure processor, and the answers.

One request and one answer at a time on a connection, each a frame (`framing.py`): one byte with the version, then MessagePack.
Another version is refused.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.versioned import VersionedDecoder, encode_versioned
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement

VERSION = 1

MAX_REQUEST_BYTES = 4096
"""A hypervisor's request is small; the bound keeps what an unread connection can hold small too."""

PAGE_VMS = 128
"""VMs in one answer; each takes at most some 7 KiB."""

_MAX_SENTENCE = 2048
Sentence = Annotated[str, Meta(max_length=_MAX_SENTENCE)]
Code = Annotated[str, Meta(max_length=64)]
Uid = Annotated[int, Meta(ge=0, lt=(1 << 32) - 1)]
"""A user id. Source: Linux, include/uapi/linux/types.h; the highest stands for none (setresuid(2))."""


HandoffId = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""Of one attempt to move a vTPM: random bytes, by its source."""

Token = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""Of a handoff (`processor/migration/handoff.py`): whoever has it may carry it to the other side, and nobody else can make it."""


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    pass


class AdmitVm(_Request, frozen=True):
    """Announce a VM: its owner may provision it. Where that is required, no other can be. → `Admitted`."""

    vm_id: uuid.UUID


class LaunchVm(_Request, frozen=True):
    """Begin the first boot of a VM that its owner has provisioned; with its vTPM unless told otherwise (C3). → `VmInfo`.

    Attributes:
        vm_id: the VM.
        with_vtpm: whether it has its vTPM.
        vm_uid: user id of the VM's process: nobody else gets interface and launch secret of this boot. None: whoever may command.
        emulated: whether the boot reaches its vTPM by the TPM emulator interface, in clear, instead of by the direct path.
    """

    vm_id: uuid.UUID
    with_vtpm: bool = True
    vm_uid: Uid | None = None
    emulated: bool = False


class CreateVtpm(_Request, frozen=True):
    """Make a vTPM for a running VM that has none yet (C3). → `VmInfo`."""

    vm_id: uuid.UUID


class StartVm(_Request, frozen=True):
    """Begin a new boot of a stopped VM; its vTPM is powered on. A hibernated one goes on where it was. → `VmInfo`.

    Attributes:
        vm_id: the VM.
        vm_uid: as of `LaunchVm`.
        emulated: as of `LaunchVm`.
    """

    vm_id: uuid.UUID
    vm_uid: Uid | None = None
    emulated: bool = False


class ResetVm(_Request, frozen=True):
    """End the boot under way, in order if the vTPM still can, and begin a new one. → `VmInfo`."""

    vm_id: uuid.UUID


class StopVm(_Request, frozen=True):
    """The VM is powered off; its vTPM is shut down in order. → `VmInfo`."""

    vm_id: uuid.UUID


class HibernateVm(_Request, frozen=True):
    """The VM is suspended: take its vTPM out of memory, whole, for the next start or for an export. → `VmInfo`."""

    vm_id: uuid.UUID


class ParkVtpm(_Request, frozen=True):
    """Take an active vTPM's process away and keep its state; its next doorbell wakes it. → `VmInfo`."""

    vm_id: uuid.UUID


class WakeVtpm(_Request, frozen=True):
    """Give a parked vTPM a process before its doorbell asks for one. → `VmInfo`."""

    vm_id: uuid.UUID


class SendStart(_Request, frozen=True):
    """Begin to move a running VM's vTPM to another secure processor; it runs on meanwhile. → `Handoff`."""

    vm_id: uuid.UUID


class SendStop(_Request, frozen=True):
    """Stop the vTPM, once the other secure processor has shown who it is, and send it. → `SendStopped`."""

    vm_id: uuid.UUID
    handoff: HandoffId


class SendFinish(_Request, frozen=True):
    """Give the vTPM up, once the other side has it and the memory. Asked again, it answers the same. → `HandoffToken`: commit."""

    vm_id: uuid.UUID
    handoff: HandoffId


class SendCancel(_Request, frozen=True):
    """Keep the vTPM, if it was not given up. → `HandoffToken`: abort."""

    vm_id: uuid.UUID
    handoff: HandoffId


class SendForget(_Request, frozen=True):
    """The other side has told that it has the vTPM. → `Handoff`."""

    vm_id: uuid.UUID
    handoff: HandoffId
    receipt: Token


class ReceiveStart(_Request, frozen=True):
    """Expect a VM from another secure processor. → `Handoff`.

    Attributes:
        vm_id: the VM.
        handoff: as its source has named it.
        vm_uid: as of `LaunchVm`.
    """

    vm_id: uuid.UUID
    handoff: HandoffId
    vm_uid: Uid | None = None


class ReceiveFinish(_Request, frozen=True):
    """Run the vTPM: its source has given it up. Asked again, it answers the same. → `HandoffToken`: receipt."""

    vm_id: uuid.UUID
    handoff: HandoffId
    token: Token


class ReceiveCancel(_Request, frozen=True):
    """Throw away what has come: its source keeps it. Without a token, only what is not durable yet. → `Handoff`."""

    vm_id: uuid.UUID
    handoff: HandoffId
    token: Token | None = None


class GetEndorsement(_Request, frozen=True):
    """The certificates of a VM's vTPM's endorsement keys, as the secure processor keeps them. → `Endorsement`."""

    vm_id: uuid.UUID


class ListVms(_Request, frozen=True):
    """The VMs by id, a page at a time: those after `after`. → `VmList`."""

    after: uuid.UUID | None = None


class GetStatus(_Request, frozen=True):
    """How the secure processor is. → `Status`."""


Request = (
    AdmitVm
    | LaunchVm
    | CreateVtpm
    | StartVm
    | ResetVm
    | StopVm
    | HibernateVm
    | ParkVtpm
    | WakeVtpm
    | SendStart
    | SendStop
    | SendFinish
    | SendCancel
    | SendForget
    | ReceiveStart
    | ReceiveFinish
    | ReceiveCancel
    | GetEndorsement
    | ListVms
    | GetStatus
)


class VtpmInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One vTPM as its hypervisor may see it.

    Attributes:
        vtpm_id: its id.
        residency: `active` (a process runs it), `parked` (kept without one), `halted` (still, while it moves away), `off`, or
            `failed`.
        interface: path of the socket on which the VM gets its interface; empty while the vTPM is off.
        connected: whether a process holds the interface.
        failure: why it failed, if it has.
    """

    vtpm_id: uuid.UUID
    residency: Literal["active", "parked", "halted", "off", "failed"]
    interface: Annotated[str, Meta(max_length=4096)] = ""
    connected: bool = False
    failure: Sentence = ""


class VmInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """One VM.

    Attributes:
        vm_id: its id.
        state: of its security block: `leaving` while its vTPM is still and moves away, `arriving` while it waits for its source's
            word that it may run here; `damaged` if its stored block cannot be believed.
        boots: boots so far.
        vtpm: its vTPM, if it has one.
        launch_secret: path of the socket on which its process gets the VM key, once; empty if there is none to be had.
    """

    vm_id: uuid.UUID
    state: Literal["running", "stopped", "failed", "hibernated", "leaving", "arriving", "damaged"]
    boots: int
    vtpm: VtpmInfo | None
    launch_secret: Annotated[str, Meta(max_length=4096)] = ""


class Admitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The VM may be provisioned."""


class VmList(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A page of VMs, ordered by id.

    Attributes:
        vms: at most `PAGE_VMS`.
        more: whether others follow.
    """

    vms: Annotated[list[VmInfo], Meta(max_length=PAGE_VMS)]
    more: bool = False


class Status(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The secure processor.

    Attributes:
        chip_id: 32 hexadecimal digits.
        software: version of spvtpm.
        vms: how many security blocks there are.
        active: vTPMs with a process.
        parked: vTPMs kept without one.
        missing_protection: sentences naming each sandbox layer that this kernel does not give.
        firmware: version of the trusted part of the software.
        max_vms: how many security blocks there can be.
    """

    chip_id: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    software: str
    vms: int
    active: int
    parked: int
    missing_protection: list[str]
    firmware: Annotated[int, Meta(ge=0, lt=1 << 32)]
    max_vms: Annotated[int, Meta(ge=1)]


class Endorsement(VtpmEndorsement, frozen=True, tag=True):
    """The certificates of a vTPM's endorsement keys; public. The owner's channel has the same answer.

    Attributes:
        vtpm_id: the vTPM.
    """

    vtpm_id: uuid.UUID


class Handoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A handoff, done as was asked.

    Attributes:
        handoff: its id.
    """

    handoff: HandoffId


class SendStopped(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The vTPM is still.

    Attributes:
        handoff: in which it moves.
        stop_nonce: 32 random bytes, public; the VM seals the last of its memory with it.
    """

    handoff: HandoffId
    stop_nonce: Token


class HandoffToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A token, for the other side of a handoff.

    Attributes:
        handoff: its id.
        token: to be carried there.
    """

    handoff: HandoffId
    token: Token


class ErrorReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Not carried out.

    Attributes:
        code: of the error class (`errors.py`).
        message: a public sentence.
    """

    code: Code
    message: Sentence


def error_reply(error: SpvtpmError) -> ErrorReply:
    """The error as it crosses the border."""
    return ErrorReply(error.code, str(error)[:_MAX_SENTENCE])


Reply = VmInfo | VmList | Admitted | Status | Endorsement | Handoff | SendStopped | HandoffToken | ErrorReply

_requests: VersionedDecoder[Request] = VersionedDecoder(VERSION, Request)
_replies: VersionedDecoder[Reply] = VersionedDecoder(VERSION, Reply)


def encode_message(message: Request | Reply) -> bytes:
    """The message as one frame's payload."""
    return encode_versioned(VERSION, message)


def parse_request(payload: bytes) -> Request:
    """A hypervisor's request; hostile bytes.

    Raises:
        MessageError: it is no request of this version.
    """
    return _requests.decode(payload)


def parse_reply(payload: bytes) -> Reply:
    """The secure processor's answer.

    Raises:
        MessageError: it is no answer of this version.
    """
    return _replies.decode(payload)
