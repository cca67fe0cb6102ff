"""What a cloud platform and a host's hypervisor agent say to each other: JSON over HTTP. Nobody trusts either of the two.

    GET /v1/host                    -> HostReport
    GET /v1/vms?after=ID            -> VmReports, a page ordered by id
    GET /v1/vms/{vm_id}             -> VmReport; of an id that is nowhere, one that says so
    PUT /v1/vms/{vm_id}             Order -> VmReport, once the VM is as ordered
    GET /v1/vms/{vm_id}/image       -> the memory image of a hibernated VM; ciphertext
    PUT /v1/vms/{vm_id}/image       the same, brought from elsewhere, before the VM is ordered to run; ?sequence=N as in an order
    GET /v1/channel                 WebSocket: one binary message a frame of a confidential channel (`introductions.py`)
    GET /v1/vms/{vm_id}/console     WebSocket: the same towards the VM itself
    GET /v1/vms/{vm_id}/link        WebSocket: the same towards the secure processor at the other end of a handoff; ?handoff=ID

A VM moves to another host by orders to both, `departing` to its source, then `arriving` to its destination, then a relay between
their links; what became of it, the source's report tells, with a token for the other side.

An order says how a VM shall be, not what to do; so it may be repeated. Orders of one VM are numbered: whoever is late with an
older one, because it was believed dead and was only slow, is refused. Errors are problem details (`problems.py`).

Format: docs/formats/agent-api.md.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from spvtpm.wire.introductions import Papers
from spvtpm.wire.messages import VmInfo

MAX_IMAGE_BYTES: Final = 16 << 20
"""The longest memory image of a hibernated VM."""

PAGE_REPORTS: Final = 128

ChipId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""32 hexadecimal digits."""

Sequence = Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
"""Of an order; grows with each operation on a VM. Within what JSON numbers carry everywhere."""

Sentence = Annotated[str, Meta(max_length=2048)]

WantedState = Literal["defined", "running", "stopped", "hibernated", "absent", "departing", "arriving"]
"""How a VM shall be: `defined` (its owner may provision it), `running`, `stopped`, `hibernated`, or `absent` from this host;
`departing` (running, and moving to another host once there is a link), or `arriving` from another host."""

HandoffName = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""Of a handoff: its id, 16 bytes in hexadecimal."""

TokenText = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""A token of a handoff: 32 bytes in hexadecimal. Not secret from those who carry it."""

HandoffOutcome = Literal["open", "kept", "gone", "come"]
"""Of a handoff, at one host: `open`; at the source `kept` (the VM stays) or `gone`; at the destination `come`."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class HostReport(_Part, frozen=True):
    """A host, and the secure processor in it.

    Attributes:
        chip_id: of the secure processor.
        firmware: its version.
        software: version of spvtpm.
        max_vms: how many VMs it takes.
        vms: how many it has.
        active: vTPMs with a process.
        parked: vTPMs kept without one.
        missing_protection: sentences naming each sandbox layer that the host's kernel does not give.
        papers: what the chip shows to whoever knocks; the platform cannot check it, and passes it on.
    """

    chip_id: ChipId
    firmware: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    software: Annotated[str, Meta(max_length=64)]
    max_vms: Annotated[int, Meta(ge=0)]
    vms: Annotated[int, Meta(ge=0)]
    active: Annotated[int, Meta(ge=0)]
    parked: Annotated[int, Meta(ge=0)]
    missing_protection: Annotated[list[Sentence], Meta(max_length=16)]
    papers: Papers


class Order(_Part, frozen=True):
    """How a VM shall be.

    Attributes:
        sequence: of the order; one that is older than the newest that the agent has seen is refused (`superseded`).
        want: how.
        handoff: of which it is a part: `arriving`; `running` for a VM that has come, `absent` for one that has not, or has gone.
        token: of that handoff, from the other host: commit with `running`; abort, or the receipt, with `absent`.
    """

    sequence: Sequence
    want: WantedState
    handoff: HandoffName | None = None
    token: TokenText | None = None


class HandoffReport(_Part, frozen=True):
    """A handoff as one host sees it.

    Attributes:
        handoff: its id.
        outcome: what became of it.
        is_linked: whether the link to the other side is there.
        copied_bytes: of the VM's memory that have gone out, or have come; pages that changed count again.
        token: for the other side: abort when it is `kept`, commit when it is `gone`, the receipt when it has `come`.
        failure: why it is `kept`, or empty: nobody wants it any more.
    """

    handoff: HandoffName
    outcome: HandoffOutcome
    is_linked: bool
    copied_bytes: Annotated[int, Meta(ge=0)]
    token: TokenText | None = None
    failure: Sentence = ""


class VmReport(_Part, frozen=True):
    """A VM as its host sees it.

    Attributes:
        vm_id: its id.
        sequence: of the newest order; 0: none.
        want: what that order said; None: none.
        machine: whether the VM's machine runs, is starting or being stopped, or is none.
        security_block: what the secure processor has of it; None: nothing.
        image: whether a memory image of it is here.
        failure: why it is not as ordered, if the agent has given up.
        handoff: the last one in which it has part here; None: none.
    """

    vm_id: uuid.UUID
    sequence: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
    want: WantedState | None
    machine: Literal["none", "changing", "running"]
    security_block: VmInfo | None
    image: bool
    failure: Sentence = ""
    handoff: HandoffReport | None = None


class VmReports(_Part, frozen=True):
    """A page of VMs, ordered by id: those that the agent or the secure processor knows.

    Attributes:
        vms: at most `PAGE_REPORTS`.
        more: whether others follow.
    """

    vms: Annotated[list[VmReport], Meta(max_length=PAGE_REPORTS)]
    more: bool
