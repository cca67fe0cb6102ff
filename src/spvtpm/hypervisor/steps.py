"""What to do next, so that a VM becomes as it was ordered to be: from what can be seen of it alone, so after any crash. Pure."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import Enum, auto

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
        case None:
            return Step.NOTHING


def _towards_running(sight: Sight) -> Step:
    block = sight.block
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
    if sight.block is not None:
        raise WrongState(
            f"VM {sight.vm_id} is still in the secure processor: its owner has not taken or destroyed the vTPM"
        )
    if sight.has_machine:
        return Step.END_MACHINE
    return Step.REMOVE if sight.kept else Step.NOTHING
