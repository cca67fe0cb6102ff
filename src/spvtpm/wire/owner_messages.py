"""What an owner may ask of a secure processor inside the confidential channel, and the answers.

Each message is one byte with the version, then MessagePack; another version is refused. The owner speaks first; each request
has one reply, but for the two that move an instance file:

    ExportVtpm        -> ExportBegins, Piece … Piece        then AcknowledgeExport -> Fate
    Provision(Import) -> Done (go on), Piece … Piece by the owner    -> MyVm

Whoever asks is known by the key of the channel's client certificate, never by a field. What belongs to somebody else does not
exist here: it is answered as an id that nobody has.

Format: docs/formats/owner-messages.md.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from spvtpm.wire.instance_content import Label, Policy
from spvtpm.wire.instance_file import MAX_FILE_BYTES, SECRET_BYTES
from spvtpm.wire.mailbox import KEY_BYTES
from spvtpm.wire.messages import Endorsement, ErrorReply
from spvtpm.wire.versioned import VersionedDecoder, encode_versioned

VERSION: Final = 1

PIECE_BYTES: Final = 1 << 16
"""An instance file travels in pieces of at most this size."""

MAX_OWNER_MESSAGE_BYTES: Final = 1 << 17
"""The longest message of either side: a page of VMs, or a piece and what is around it."""

PAGE_MY_VMS: Final = 16
"""With the longest policy and label, one VM takes some 6 KiB."""

MAX_EVENTS: Final = 32

_Secret = Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
_VmKey = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Size = Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
_Version = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Time = Annotated[int, Meta(ge=0, le=253_402_300_799)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    pass


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class NewVtpm(_Message, frozen=True):
    """The VM's vTPM begins in the default state, when the hypervisor launches the VM.

    Attributes:
        policy: what the owner allows.
        label: the owner's words for the vTPM.
    """

    policy: Policy
    label: Label = ""


class ImportVtpm(_Message, frozen=True):
    """The VM's vTPM comes out of an instance file, which follows; so do its policy and label.

    Attributes:
        size_bytes: of the file.
        newest_version: of this vTPM that the owner has seen; an older file is refused. 0: none.
    """

    size_bytes: _Size
    newest_version: _Version


class Provision(_Message, frozen=True):
    """Make a VM's security block, and all that its vTPM needs. → `MyVm`; with `ImportVtpm`, `Done` first, then the pieces.

    Attributes:
        vm_id: of a VM that this secure processor does not know.
        user_secret: 32 bytes, the owner's half of the key of exported instances. Secret.
        vm_key: 32 bytes, shared with the VM. Secret.
        vtpm: how the vTPM begins.
        inject_key: whether the VM key is handed to the VM at each boot, once (`launch_secret.py`).
    """

    vm_id: uuid.UUID
    user_secret: _Secret
    vm_key: _VmKey
    vtpm: NewVtpm | ImportVtpm
    inject_key: bool = False

    def __repr__(self) -> str:
        return f"Provision(vm_id={self.vm_id})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("vm_id", self.vm_id)]


class Piece(_Message, frozen=True):
    """The next bytes of an instance file, in order.

    Attributes:
        data: 1 to 65,536 bytes; fewer than that come at the end alone.
    """

    data: Annotated[bytes, Meta(min_length=1, max_length=PIECE_BYTES)]


class ExportVtpm(_Message, frozen=True):
    """Give out the vTPM of a VM that is stopped or hibernated. → `ExportBegins`, then the file. Nothing is destroyed yet."""

    vm_id: uuid.UUID


class AcknowledgeExport(_Message, frozen=True):
    """The owner has the file, whole and durable: destroy security block, vTPM and secrets. → `Fate`.

    Attributes:
        vm_id: the VM.
        version: of the instance, as `ExportBegins` said.
        sha256: of the whole file, 32 bytes; another one than that of the file which was given out destroys nothing.
    """

    vm_id: uuid.UUID
    version: _Version
    sha256: _Sha256


class DestroyVm(_Message, frozen=True):
    """Destroy a VM's security block, vTPM and secrets without an export, for good. A running VM loses its vTPM. → `Done`."""

    vm_id: uuid.UUID


class RotateUserSecret(_Message, frozen=True):
    """Another `UserSecret` for all this owner's VMs on this secure processor, all or none. → `Rotated`.

    Attributes:
        user_secret: 32 bytes. Secret.
    """

    user_secret: _Secret

    def __repr__(self) -> str:
        return "RotateUserSecret()"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []


class ListMine(_Message, frozen=True):
    """This owner's VMs by id, a page at a time: those after `after`. → `MyVms`."""

    after: uuid.UUID | None = None


class AskFate(_Message, frozen=True):
    """What became of a vTPM here; after a connection that broke, for one. → `Fate`."""

    vtpm_id: uuid.UUID


class ReadEvents(_Message, frozen=True):
    """The newest events of a VM. → `Events`."""

    vm_id: uuid.UUID


class GetEndorsement(_Message, frozen=True):
    """The certificates of a VM's vTPM's endorsement keys. → `Endorsement`."""

    vm_id: uuid.UUID


class Done(_Message, frozen=True):
    """Carried out, or ready for what follows; there is nothing to tell."""


class ExportBegins(_Message, frozen=True):
    """An export begins; `size_bytes` of file follow in pieces.

    Attributes:
        vtpm_id: the vTPM.
        version: of the instance; no other file has it.
        size_bytes: of the file.
        hibernated: whether the file goes on where the VM was, rather than from its shutdown.
    """

    vtpm_id: uuid.UUID
    version: _Version
    size_bytes: _Size
    hibernated: bool


class Fate(_Message, frozen=True):
    """What became of a vTPM here.

    Attributes:
        vtpm_id: the vTPM.
        state: `here`, `exported` (destroyed after an acknowledged export), `migrated` (given to another chip), `destroyed`, or
            `unknown`: never here, or not this owner's, or so long ago that it is forgotten.
        version: of its last export or import here; 0 if there was none.
        sha256: of the acknowledged file, 32 bytes, if it was exported.
        chip: that it was given to, 16 bytes, if it has migrated.
    """

    vtpm_id: uuid.UUID
    state: Literal["here", "exported", "migrated", "destroyed", "unknown"]
    version: _Version
    sha256: _Sha256 | None = None
    chip: Annotated[bytes, Meta(min_length=16, max_length=16)] | None = None


class MyVm(_Message, frozen=True):
    """One of the owner's VMs.

    Attributes:
        vm_id: its id.
        state: of its security block.
        boots: boots so far.
        label: the owner's words.
        vtpm_id: its vTPM, if it has one yet.
        residency: where the vTPM lives, as `messages.VtpmInfo` has it; empty if there is none.
        version: of the vTPM's last export or import here; 0 if there was none.
        policy: what the owner allows.
    """

    vm_id: uuid.UUID
    state: Literal["running", "stopped", "failed", "hibernated", "leaving", "arriving"]
    boots: Annotated[int, Meta(ge=0)]
    label: Label
    vtpm_id: uuid.UUID | None
    residency: Literal["", "active", "parked", "halted", "off", "failed"]
    version: _Version
    policy: Policy


class MyVms(_Message, frozen=True):
    """A page of the owner's VMs, ordered by id.

    Attributes:
        vms: at most `PAGE_MY_VMS`.
        more: whether others follow.
    """

    vms: Annotated[list[MyVm], Meta(max_length=PAGE_MY_VMS)]
    more: bool


class Rotated(_Message, frozen=True):
    """The `UserSecret` of this many VMs is another one now."""

    vms: Annotated[int, Meta(ge=0)]


class Event(_Part, frozen=True):
    """Something that happened to a VM, as its secure processor saw it.

    Attributes:
        time_s: when; seconds since 1970, UTC, by the secure processor's clock, which the host sets.
        what: a word: `provisioned`, `launched`, `started`, `stopped`, `hibernated`, `resumed`, `failed`, `imported`,
            `export-begun`, `secret-rotated`, `launch-secret-taken`, `launch-secret-refused`, `migrated`, `arrived`,
            `migration-ended`, `emulator-refused`. A reset is a stop and a start.
        detail: a sentence, or nothing.
    """

    time_s: _Time
    what: Annotated[str, Meta(max_length=32, pattern=r"\A[a-z-]+\Z")]
    detail: Annotated[str, Meta(max_length=256, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")] = ""


class Events(_Message, frozen=True):
    """The newest events, oldest first.

    Attributes:
        events: at most `MAX_EVENTS`.
    """

    events: Annotated[list[Event], Meta(max_length=MAX_EVENTS)]


OwnerRequest = (
    Provision
    | Piece
    | ExportVtpm
    | AcknowledgeExport
    | DestroyVm
    | RotateUserSecret
    | ListMine
    | AskFate
    | ReadEvents
    | GetEndorsement
)
OwnerReply = ExportBegins | Piece | Fate | MyVm | MyVms | Rotated | Events | Endorsement | Done | ErrorReply

_UNREADABLE = "no message of the owner's session, or out of bounds"
"""Instead of the decoder's own words, which could quote a secret that it could not read."""

_requests: VersionedDecoder[OwnerRequest] = VersionedDecoder(VERSION, OwnerRequest, unreadable=_UNREADABLE)
_replies: VersionedDecoder[OwnerReply] = VersionedDecoder(VERSION, OwnerReply, unreadable=_UNREADABLE)


def encode_owner_message(message: OwnerRequest | OwnerReply) -> bytes:
    """The message as one payload; at most `MAX_OWNER_MESSAGE_BYTES`."""
    return encode_versioned(VERSION, message)


def parse_owner_request(payload: bytes) -> OwnerRequest:
    """An owner's request; hostile bytes.

    Raises:
        MessageError: it is no request of this version. Nothing of it is quoted.
    """
    return _requests.decode(payload)


def parse_owner_reply(payload: bytes) -> OwnerReply:
    """The secure processor's answer; hostile bytes.

    Raises:
        MessageError: it is no answer of this version.
    """
    return _replies.decode(payload)
