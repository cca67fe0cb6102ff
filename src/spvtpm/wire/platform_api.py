"""What the cloud platform's users say to it: JSON over HTTP, under /v1. The platform sees all of it; so it holds no secret.

Every request has `Authorization: Bearer TOKEN`. Each that begins an operation may have an `Idempotency-Key` (1 to 64 visible
characters), to be said again with it. Errors are problem details (`problems.py`). Format: docs/formats/platform-api.md.

    POST   /v1/vms                        NewVm -> 202 Operation      place a VM at a host; its owner provisions it then
    GET    /v1/vms?after=NAME             -> VmPage
    GET    /v1/vms/{vm_id}                -> Vm
    POST   /v1/vms/{vm_id}/place          Wants -> 202 Operation      a host again, for a VM that is away
    POST   /v1/vms/{vm_id}/start          -> 202 Operation            the next boot
    POST   /v1/vms/{vm_id}/shutdown       -> 202 Operation
    POST   /v1/vms/{vm_id}/hibernate      -> 202 Operation
    POST   /v1/vms/{vm_id}/resume         -> 202 Operation            go on where it was hibernated
    POST   /v1/vms/{vm_id}/release        -> 202 Operation            its owner has taken the vTPM: it needs no host
    POST   /v1/vms/{vm_id}/migrate        Destination -> 202 Operation    to another host while it runs
    DELETE /v1/vms/{vm_id}                -> 202 Operation            its owner has destroyed it
    GET    /v1/vms/{vm_id}/events?after=N -> EventPage
    PUT    /v1/vms/{vm_id}/pcrs           PublishedPcrs -> 204
    GET    /v1/vms/{vm_id}/console        WebSocket: frames to the VM (docs/formats/console.md)
    GET    /v1/operations?vm_id=ID&before=ID -> OperationPage, newest first
    GET    /v1/operations/{operation_id}  -> Operation
    GET    /v1/operations/{operation_id}/events   server-sent events: `operation`, each with an Operation, until it has ended
    POST   /v1/operations/{operation_id}/cancel   -> Operation        as it is now; a migration alone, until the VM has gone
    GET    /v1/chips                      -> list of Chip
    GET    /v1/chips/{chip_id}            -> Chip
    GET    /v1/chips/{chip_id}/channel    WebSocket: one binary message a frame of a confidential channel
    GET    /v1/me                         -> Me
    for administrators (scope `admin`):
    GET    /v1/hosts                      -> list of Host
    PUT    /v1/hosts/{name}               HostAddress -> Host
    DELETE /v1/hosts/{name}               -> 204
    POST   /v1/hosts/{name}/drain         -> Drain                    it takes no VMs any more, and those that run there move away
    DELETE /v1/hosts/{name}/drain         -> Host                     it takes VMs again
    GET    /v1/users                      -> list of User
    PUT    /v1/users/{name}               -> User
    DELETE /v1/users/{name}               -> 204
    POST   /v1/users/{name}/tokens        NewToken -> 201 MadeToken   the token itself is told once, here
    DELETE /v1/users/{name}/tokens/{token_id}     -> 204
"""

from __future__ import annotations

import uuid
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from spvtpm.wire.agent_api import ChipId, Sentence
from spvtpm.wire.introductions import Papers
from spvtpm.wire.problems import Problem

PAGE_VMS: Final = 100
PAGE_OPERATIONS: Final = 100
PAGE_EVENTS: Final = 100
MAX_BODY_BYTES: Final = 65_536
"""The longest body of a request."""

Name = Annotated[str, Meta(pattern=r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
"""Of a VM, a host or a user: a DNS label in lower case (RFC 1123, section 2.1)."""

Scope = Literal["read", "vms", "admin"]
"""`read`: look at one's own VMs and at all chips; `vms`: that, and operate them; `admin`: hosts, users, and a look at all VMs."""

Time = Annotated[float, Meta(ge=0, le=253_402_300_799)]
"""Seconds since 1970, UTC."""

OperationKind = Literal["create", "place", "start", "shutdown", "hibernate", "resume", "release", "destroy", "migrate"]

VmState = Literal["placed", "running", "stopped", "hibernated", "failed", "away"]
"""`placed`: has a host, its owner has still to provision it or boot it. `away`: its owner has its vTPM, it has no host."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Wants(_Part, frozen=True):
    """Which hosts will do for a VM. The platform places by it; that it does so rightly is checked by owner and secure processor.

    Attributes:
        chips: ids of the chips that will do; None: any.
        minimum_firmware: the oldest version that will do.
        host: the one host that will do; None: any.
    """

    chips: Annotated[list[ChipId], Meta(min_length=1, max_length=256)] | None = None
    minimum_firmware: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] = 0
    host: Name | None = None


class NewVm(_Part, frozen=True):
    """A VM to be placed.

    Attributes:
        vm_id: as its owner chose it, random.
        name: no other VM of this user has it.
        wants: which hosts will do.
    """

    vm_id: uuid.UUID
    name: Name
    wants: Wants = Wants()  # frozen


class Destination(_Part, frozen=True):
    """Where a VM shall move.

    Attributes:
        host: which host; None: the platform chooses one that will do.
    """

    host: Name | None = None


class PublishedPcrs(_Part, frozen=True):
    """PCR values that an owner shows to the platform; its word, not the platform's.

    Attributes:
        banks: for each bank, such as `sha256`, values in hexadecimal by index.
        read_s: when they were read, by the owner's clock.
    """

    banks: Annotated[
        dict[
            Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,16}\Z")],
            Annotated[
                dict[
                    Annotated[str, Meta(pattern=r"\A([0-9]|1[0-9]|2[0-3])\Z")],
                    Annotated[str, Meta(pattern=r"\A[0-9a-f]{40,128}\Z")],
                ],
                Meta(max_length=24),
            ],
        ],
        Meta(max_length=8),
    ]
    read_s: Time


class Vm(_Part, frozen=True):
    """A VM as the platform knows it; what it says of the vTPM is hearsay of the host's agent.

    Attributes:
        vm_id: its id.
        name: its name.
        user: whose it is.
        state: what the platform last heard.
        host: where it is placed.
        chip_id: of that host.
        vtpm_id: of its vTPM, if it has one.
        vtpm: where that lives, as `messages.VtpmInfo` has it; empty: there is none, or it is away.
        boots: boots so far on this host.
        has_image: whether a memory image is kept, of a hibernated VM.
        operation: the one that is under way.
        failure: why it is not as it should be.
        wants: which hosts will do.
        pcrs: what its owner has published.
        created_s: when it was created.
        changed_s: when anything of this changed last.
    """

    vm_id: uuid.UUID
    name: Name
    user: Name
    state: VmState
    host: Name | None
    chip_id: ChipId | None
    vtpm_id: uuid.UUID | None
    vtpm: Literal["", "active", "parked", "halted", "off", "failed"]
    boots: Annotated[int, Meta(ge=0)]
    has_image: bool
    operation: uuid.UUID | None
    failure: Sentence
    wants: Wants
    pcrs: PublishedPcrs | None
    created_s: Time
    changed_s: Time


class VmPage(_Part, frozen=True):
    """VMs ordered by name; `more`: whether others follow."""

    vms: Annotated[list[Vm], Meta(max_length=PAGE_VMS)]
    more: bool


class Operation(_Part, frozen=True):
    """Something that takes a while.

    Attributes:
        operation_id: its id.
        kind: what it does.
        vm_id: of the VM.
        vm_name: of the VM.
        state: `queued`, `running`, `done`, or `failed`: then what it had begun is undone, or named in `error`.
        step: what it does now, in words.
        steps_done: how many steps are behind it.
        steps: how many there are.
        error: why it failed.
        created_s: when it was asked for.
        changed_s: when anything of this changed last.
    """

    operation_id: uuid.UUID
    kind: OperationKind
    vm_id: uuid.UUID
    vm_name: Name
    state: Literal["queued", "running", "done", "failed"]
    step: Sentence
    steps_done: Annotated[int, Meta(ge=0)]
    steps: Annotated[int, Meta(ge=1)]
    error: Problem | None
    created_s: Time
    changed_s: Time


class OperationPage(_Part, frozen=True):
    """Operations, newest first; `more`: whether older ones follow."""

    operations: Annotated[list[Operation], Meta(max_length=PAGE_OPERATIONS)]
    more: bool


class Event(_Part, frozen=True):
    """Something that happened to a VM, as the platform saw it.

    Attributes:
        number: grows with time; in all VMs.
        time_s: when.
        what: a word, such as `started`.
        detail: a sentence, or nothing.
    """

    number: Annotated[int, Meta(ge=1)]
    time_s: Time
    what: Annotated[str, Meta(max_length=32, pattern=r"\A[a-z-]+\Z")]
    detail: Sentence


class EventPage(_Part, frozen=True):
    """Events, oldest first; `more`: whether others follow."""

    events: Annotated[list[Event], Meta(max_length=PAGE_EVENTS)]
    more: bool


class Chip(_Part, frozen=True):
    """A secure processor that the platform has. Believe nothing of this but what the papers prove.

    Attributes:
        chip_id: its id.
        host: the host that it is in.
        is_online: whether its host answered lately.
        firmware: its version, as the host's agent says.
        software: version of spvtpm, as the host's agent says.
        vms: VMs placed there.
        max_vms: how many it takes.
        papers: its certificates, as it showed them to the agent.
    """

    chip_id: ChipId
    host: Name
    is_online: bool
    firmware: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    software: Annotated[str, Meta(max_length=64)]
    vms: Annotated[int, Meta(ge=0)]
    max_vms: Annotated[int, Meta(ge=0)]
    papers: Papers


class HostAddress(_Part, frozen=True):
    """How the platform reaches a host's agent.

    Attributes:
        address: `unix:/path`, `http://host:port` or `https://host:port`.
        token: that the agent wants to hear. The one secret that the platform keeps: it opens that host's agent, and no vTPM.
    """

    address: Annotated[str, Meta(pattern=r"\A(unix:/[ -~]{1,100}|https?://[A-Za-z0-9.:\[\]-]{1,255})\Z")]
    token: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{32,128}\Z")]

    def __repr__(self) -> str:
        return f"HostAddress(address={self.address!r})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("address", self.address)]


class Host(_Part, frozen=True):
    """A host.

    Attributes:
        name: its name.
        address: of its agent.
        is_online: whether the agent answered lately.
        seen_s: when it last did; None: never.
        chip_id: of its secure processor, once it has answered.
        firmware: of that.
        software: of that.
        vms: VMs placed there.
        max_vms: how many it takes.
        missing_protection: what the host's kernel does not give.
        failure: why it is not online.
        is_draining: whether it takes no VMs any more.
    """

    name: Name
    address: str
    is_online: bool
    seen_s: Time | None
    chip_id: ChipId | None
    firmware: int
    software: str
    vms: int
    max_vms: int
    missing_protection: list[Sentence]
    failure: Sentence
    is_draining: bool


class Remaining(_Part, frozen=True):
    """A VM that does not move away from a host by itself.

    Attributes:
        vm_id: its id.
        name: its name.
        user: whose it is.
        why: why it stays.
    """

    vm_id: uuid.UUID
    name: Name
    user: Name
    why: Sentence


class Drain(_Part, frozen=True):
    """A host that is being emptied. Asked again, it goes on with what is still there.

    Attributes:
        host: as it is now.
        moving: the operations that move VMs away, those that were under way already too.
        remaining: VMs that stay, until their owners take them.
    """

    host: Host
    moving: list[Operation]
    remaining: list[Remaining]


class Token(_Part, frozen=True):
    """A token, without what makes it one."""

    token_id: uuid.UUID
    note: str
    scopes: list[Scope]
    created_s: Time
    expires_s: Time | None


class User(_Part, frozen=True):
    """A user, and its tokens."""

    name: Name
    tokens: list[Token]
    created_s: Time


class NewToken(_Part, frozen=True):
    """A token to be made.

    Attributes:
        scopes: what it allows.
        note: what it is for.
        expires_s: when it ends; None: never.
    """

    scopes: Annotated[list[Scope], Meta(min_length=1, max_length=3)]
    note: Annotated[str, Meta(max_length=64, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")] = ""
    expires_s: Time | None = None


class MadeToken(_Part, frozen=True):
    """A token that was made just now. Whoever has `secret` is the user, within the scopes; it is never shown again."""

    token: Token
    secret: Annotated[str, Meta(max_length=128)]

    def __repr__(self) -> str:
        return f"MadeToken({self.token.token_id})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("token_id", self.token.token_id)]


class Me(_Part, frozen=True):
    """Who the token's user is."""

    name: Name
    scopes: list[Scope]
