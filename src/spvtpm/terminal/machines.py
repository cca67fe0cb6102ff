"""The owner's VMs at a platform: what each of the operations on them begins with, and the last word of a secure processor.

The platform says what it likes. So each operation asks the keyring what is known, does what is missing, and believes that it
is done when a verified secure processor says so. Each can be said again after a death at any moment: it goes on.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from spvtpm.terminal.attestation import Verified
from spvtpm.terminal.desk import Desk, Wishes
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.operations import Tell, tell_nobody, wait_for, wait_for_end
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.platform_relay import to_chip
from spvtpm.terminal.session import TIMEOUT_S, Progress, no_progress
from spvtpm.terminal.whereabouts import AtChip, Destroyed, Exporting, Importing, Known
from spvtpm.wire.errors import ChipNotAllowed, NotFound
from spvtpm.wire.owner_messages import MyVm
from spvtpm.wire.platform_api import Operation, Vm
from spvtpm.wire.platform_errors import PlatformContradicts


def _ignore(_verified: Verified) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Site:
    """An owner at a platform.

    Attributes:
        keyring: the owner's.
        platform: which carries frames and runs VMs.
        tell_verified: is told of each chip that was verified, before anything is said to it.
        tell: is told how far an operation of the platform is.
        progress: is told how far a transfer is.
        timeout_s: how long each message to a chip may take.
    """

    keyring: Keyring
    platform: Platform
    tell_verified: Callable[[Verified], None] = _ignore
    tell: Tell = tell_nobody
    progress: Progress = no_progress
    timeout_s: float = TIMEOUT_S

    def desk(self, chip_id: bytes, owned: OwnedVm | None = None) -> Desk:
        """The owner's desk at exactly this chip, which has to meet the wishes for a VM, if one is given."""
        wishes = Wishes(frozenset([chip_id]))
        if owned is not None:
            wishes = Wishes(frozenset([chip_id]), owned.policy.minimum_firmware, owned.fleet_id)
        return Desk(self.keyring, to_chip(self.platform, chip_id), wishes, self.tell_verified, self.timeout_s)

    def run(self, operation: Operation) -> None:
        """Waits for an operation that was begun.

        Raises:
            SpvtpmError: it failed, or has not ended.
        """
        wait_for(self.platform, operation, self.tell)

    def hear_of(self, owned: OwnedVm) -> Vm | None:
        """What the platform says of a VM, once no operation on it is under way; None: that it knows none of this id.

        Raises:
            PlatformContradicts: it gives it another name.
            SpvtpmError: it is away, or an operation has not ended.
        """
        try:
            vm = self.platform.vm(owned.vm_id)
            if vm.operation is not None:
                wait_for_end(self.platform, self.platform.operation(vm.operation), self.tell)
                vm = self.platform.vm(owned.vm_id)
        except NotFound:
            return None
        if vm.name != owned.name:
            raise PlatformContradicts(f"the platform says that the VM {vm.vm_id} is {vm.name}; it is {owned.name}")
        return vm

    def hear(self, owned: OwnedVm) -> Vm:
        """The same, of a VM that there is.

        Raises:
            PlatformContradicts: the platform denies it.
        """
        vm = self.hear_of(owned)
        if vm is None:
            raise PlatformContradicts(f"the platform says that there is no VM {owned.name} ({owned.vm_id})")
        return vm

    def confirm(self, owned: OwnedVm, chip_id: bytes, state: str) -> MyVm:
        """Has a chip confirm what the platform says of a VM; the keyring remembers where its vTPM is.

        Raises:
            PlatformContradicts: it is otherwise.
            SpvtpmError: the chip cannot be asked, or is none.
        """
        return verify_state(owned, self.desk(chip_id).look(owned.vm_id), state)


def verify_state(owned: OwnedVm, here: MyVm | None, state: str) -> MyVm:
    """Whether a VM, as its chip has it, is as the platform says.

    Raises:
        PlatformContradicts: it is otherwise.
    """
    if here is None or here.state != state:
        found = "is not there" if here is None else f"is {here.state}"
        raise PlatformContradicts(
            f"the platform says that {owned.name} is {state}; its secure processor says that it {found}"
        )
    return here


def vtpm_of(keyring: Keyring, vm_id: uuid.UUID) -> Known | None:
    """What is remembered of a VM's vTPM; of several, the one that lives, then the one remembered last."""
    of_vm = [known for known in keyring.content.vtpms if known.vm_id == vm_id]
    return max(of_vm, key=lambda known: not isinstance(known.place, Destroyed), default=None)


def chip_of(vm: Vm, owned: OwnedVm) -> bytes:
    """The chip at which the platform has placed a VM, 16 bytes.

    Raises:
        PlatformContradicts: it does not say.
        ChipNotAllowed: its owner does not want that one.
    """
    if vm.chip_id is None:
        raise PlatformContradicts(f"the platform says that {vm.name} is {vm.state}, and not at which chip")
    chip_id = bytes.fromhex(vm.chip_id)
    verify_allowed(owned, chip_id)
    return chip_id


def verify_allowed(owned: OwnedVm, chip_id: bytes) -> None:
    """Whether a VM's owner wants it at a chip where the platform has it.

    Raises:
        ChipNotAllowed: he does not.
    """
    if owned.policy.chips is not None and chip_id not in owned.policy.chips:
        raise ChipNotAllowed(
            f"the platform has placed {owned.name} at the chip {chip_id.hex()}, which its policy does not allow"
        )


def chip_where_it_lives(known: Known | None, owned: OwnedVm) -> bytes | None:
    """The chip that has a VM's vTPM, or had it last, as the keyring knows; None: none, as far as it knows."""
    if known is None:
        return owned.chip_id
    place = known.place
    return place.chip_id if isinstance(place, (AtChip, Exporting, Importing)) else None
