"""What to do next, so that a VM becomes as it was ordered to be: from what can be seen of it alone, so after any crash. Pure."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from spvtpm.hypervisor.records import Brought, HandoffRecord
from spvtpm.hypervisor.virtual_machine import MachineState
from spvtpm.wire.agent_api import WantedState
from spvtpm.wire.errors import IntegrityError, NotFound, WrongState
from spvtpm.wire.messages import VmInfo


class Step(Enum):
    """One thing to do; then look again."""

    NOTHING = auto()  # it is as ordered
    ADMIT = auto()  # its owner may provision it
    LAUNCH = auto()  # the secure processor begins its first boot
    START = auto()  # the secure processor begins another, or goes on where it was hibernated
    RESET = auto()  # the secure processor ends its boot and begins another
    STOP = auto()  # the secure processor ends its boot
    HIBERNATE = auto()  # the secure processor takes its vTPM out of memory, whole
    MARK_RESUMING = auto()  # note that its memory is in its image alone, until the machine has it
    BEGIN_MACHINE = auto()  # the machine takes part in the boot that has begun
    AWAIT_MACHINE = auto()  # the machine comes up, as an agent that died meanwhile has begun it
    POWER_OFF = auto()  # the machine ends in order
    END_MACHINE = auto()  # the machine ends at once
    SUSPEND = auto()  # the machine's memory goes into its image
    GO_ON = auto()  # the suspended or halted machine runs on
    FORGET_IMAGE = auto()  # its image is of no use any more
    REMOVE = auto()  # what the host has of it goes
    SEND_START = auto()  # the secure processor begins a handoff to another
    MOVE = auto()  # the machine's memory goes there, then both are halted, the vTPM follows, and is given up
    SETTLE = auto()  # the handoff does not go on: the vTPM stays, if it was not given up
    RECEIVE_START = auto()  # the secure processor expects the VM
    KEEP_MEMORY = auto()  # the memory that has come becomes its image
    RECEIVE_FINISH = auto()  # the vTPM is this host's
    RECEIVE_CANCEL = auto()  # what has come of it is thrown away
    FORGET_HANDOFF = auto()  # the other host has told that it has it


Way = Literal["none", "waiting", "linked", "ended"]
"""To the other end of an open handoff. Source: not tried, or not any more; no link yet; there is one.
Destination: not expected; expected; there is a link; whatever was to come of the memory has come, or will not."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A VM as it is found.

    Attributes:
        vm_id: the VM.
        want: how it shall be.
        resuming: as in its record.
        block: what the secure processor has of it.
        admitted: whether the secure processor has been told that its owner may provision it.
        begun: the boot that the agent had begun, in which no machine has had part; 0: none.
        machine: its machine.
        machine_boots: the boot in which that takes part.
        image: whether there is a memory image.
        kept: whether the host has anything of its machine.
        brought: what came with the order, of a handoff.
        handoff: the last one of the VM here.
        way: to the other end of that.
    """

    vm_id: uuid.UUID
    want: WantedState | None
    resuming: bool
    block: VmInfo | None
    admitted: bool
    begun: int
    machine: MachineState
    machine_boots: int
    image: bool
    kept: bool
    brought: Brought | None = None
    handoff: HandoffRecord | None = None
    way: Way = "none"

    @property
    def has_machine(self) -> bool:
        """Whether there is a process."""
        return self.machine != "none"

    @property
    def takes_part(self) -> bool:
        """Whether the machine takes part in the boot that is under way."""
        block = self.block
        running = block is not None and block.state == "running" and block.boots == self.machine_boots
        return self.has_machine and running


def next_step(sight: Sight) -> Step:
    """What to do next.

    Raises:
        NotFound, WrongState, IntegrityError: it cannot become as it was ordered to be.
    """
    if sight.block is not None and sight.block.state == "damaged":
        raise IntegrityError(
            f"the security block of VM {sight.vm_id} cannot be believed: it can be neither run nor moved"
        )
    if sight.handoff is not None and sight.handoff.outcome == "open":
        step = _of_open_handoff(sight, sight.handoff)
        if step is not None:
            return step
    match sight.want:
        case "defined":
            return Step.NOTHING if sight.admitted or sight.block is not None else Step.ADMIT
        case "running":
            return _towards_running(sight)
        case "stopped":
            return _towards_stopped(sight)
        case "hibernated":
            return _towards_hibernated(sight)
        case "absent":
            return _towards_absent(sight)
        case "departing":
            return _towards_departing(sight)
        case "arriving":
            return _towards_arriving(sight)
        case None:
            return Step.NOTHING


def _of_open_handoff(sight: Sight, handoff: HandoffRecord) -> Step | None:
    """None: what is wanted says it."""
    if handoff.side == "source":
        if sight.want != "departing" or sight.way == "none":
            return Step.SETTLE
        return Step.MOVE if sight.way == "linked" else Step.NOTHING
    is_here = sight.block is not None
    is_this_one = sight.brought is not None and sight.brought.handoff == handoff.handoff
    if sight.want == "arriving" and is_this_one:
        if is_here:
            return Step.NOTHING
        return {"none": Step.RECEIVE_START, "ended": Step.RECEIVE_CANCEL}.get(sight.way, Step.NOTHING)
    if sight.want == "running" and is_this_one:
        return None
    if sight.want in ("arriving", "absent"):
        return Step.RECEIVE_CANCEL
    return None


def _towards_departing(sight: Sight) -> Step:
    handoff = sight.handoff
    if handoff is None or handoff.side == "destination":
        if sight.takes_part and sight.machine == "running":
            return Step.SEND_START
        raise WrongState(f"VM {sight.vm_id} does not run: only one that runs moves to another host by itself")
    if handoff.outcome == "kept":
        return _towards_running(sight)
    return Step.POWER_OFF if sight.has_machine else Step.NOTHING


def _towards_arriving(sight: Sight) -> Step:
    """It is not expected, and was not: or what was expected is not coming any more."""
    if sight.brought is None:
        return Step.NOTHING
    return Step.NOTHING if _has_come(sight) else Step.RECEIVE_START


def _has_come(sight: Sight) -> bool:
    """In the handoff that the order is about."""
    brought, handoff = sight.brought, sight.handoff
    if brought is None or handoff is None:
        return False
    return (handoff.handoff, handoff.outcome) == (brought.handoff, "come")


def _towards_running(sight: Sight) -> Step:
    block, brought, handoff = sight.block, sight.brought, sight.handoff
    if brought is not None and brought.token is not None and not _has_come(sight):
        return Step.RECEIVE_FINISH if sight.way == "none" or sight.resuming else Step.KEEP_MEMORY
    if block is None and handoff is not None and (handoff.side, handoff.outcome) == ("source", "gone"):
        raise WrongState(f"VM {sight.vm_id} has moved to another host's secure processor")
    if block is not None and block.state in ("leaving", "arriving"):
        raise WrongState(f"VM {sight.vm_id} is {block.state}, and its handoff has not ended")
    if sight.has_machine:
        if not sight.takes_part:
            return Step.END_MACHINE
        if sight.machine in ("suspended", "halted"):
            return Step.GO_ON
        if sight.machine == "starting":
            return Step.AWAIT_MACHINE
        return Step.FORGET_IMAGE if sight.image or sight.resuming else Step.NOTHING
    if block is None:
        raise NotFound(
            f"the secure processor has no VM {sight.vm_id}: its owner has not provisioned it, or has taken it"
        )
    if block.state == "failed":
        return Step.STOP
    if block.state == "running":
        return _machine_for_boot(sight, block)
    if block.state == "hibernated":
        if sight.image and not sight.resuming:
            return Step.MARK_RESUMING
    elif sight.image or sight.resuming:  # a cold boot: what memory there was is gone
        return Step.FORGET_IMAGE
    return Step.START if block.boots else Step.LAUNCH


def _machine_for_boot(sight: Sight, block: VmInfo) -> Step:
    """A boot is under way without a machine. If one had part in it, the secure processor does not give the VM key again."""
    if sight.begun == block.boots or (sight.resuming and sight.image):
        return Step.BEGIN_MACHINE
    return Step.FORGET_IMAGE if sight.image or sight.resuming else Step.RESET


def _towards_stopped(sight: Sight) -> Step:
    if sight.has_machine:
        return Step.POWER_OFF
    if sight.block is None:
        return Step.NOTHING
    if sight.block.state == "hibernated":
        raise WrongState(f"VM {sight.vm_id} is hibernated: to stop it would throw its state away; resume it first")
    if sight.block.state != "stopped":
        return Step.STOP
    return Step.FORGET_IMAGE if sight.image or sight.resuming else Step.NOTHING


def _towards_hibernated(sight: Sight) -> Step:
    block = sight.block
    if sight.has_machine and not sight.takes_part:
        return Step.END_MACHINE
    if block is None or block.state == "hibernated":
        return Step.NOTHING
    if sight.has_machine:
        if sight.machine == "suspended":
            return Step.HIBERNATE
        if sight.machine == "halted":
            return Step.GO_ON
        if sight.machine == "starting":
            return Step.AWAIT_MACHINE
        return Step.FORGET_IMAGE if sight.image or sight.resuming else Step.SUSPEND
    if block.state == "running" and sight.image and not sight.resuming:
        return Step.HIBERNATE  # it was suspended in this boot, for an image of an earlier one is removed before a boot
    raise WrongState(f"VM {sight.vm_id} does not run, so there is nothing to hibernate: {_why(block, sight)}")


def _why(block: VmInfo, sight: Sight) -> str:
    if block.state == "running":
        return "its boot is under way, and its machine has ended" if not sight.resuming else "it is being resumed"
    return f"it is {block.state}"


def _towards_absent(sight: Sight) -> Step:
    if sight.brought is not None and sight.brought.token is not None:
        is_arriving = sight.block is not None and sight.block.state == "arriving"
        return Step.RECEIVE_CANCEL if is_arriving else Step.FORGET_HANDOFF
    if sight.block is not None:
        raise WrongState(
            f"VM {sight.vm_id} is still in the secure processor: its owner has not taken or destroyed the vTPM"
        )
    if sight.has_machine:
        return Step.END_MACHINE
    return Step.REMOVE if sight.kept else Step.NOTHING
