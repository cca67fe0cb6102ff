"""Where a VM is that was perhaps moved: its platform moves VMs as their owner wishes, or to empty a host, and asks nobody.

    1  the platform says that it is at another chip than the keyring knows, or that one does not have it
    2  the chip where it was says to which one it has given the vTPM, if it answers; and so on
    3  the new chip is one that the owner allows, verified, and says that the VM is there     the keyring remembers

The platform's word begins this, and decides nothing. Who dies in between asks the same again.
"""

from __future__ import annotations

from typing import Final

from spvtpm.terminal.machines import Site, chip_where_it_lives, verify_allowed, vtpm_of
from spvtpm.terminal.operations import wait_for_end
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.whereabouts import AtChip, Exporting, Importing, Known, after_fate
from spvtpm.wire.errors import NotFound, SpvtpmError, StaleInstance, WrongState
from spvtpm.wire.owner_messages import Fate, MyVm
from spvtpm.wire.platform_api import Operation, Vm
from spvtpm.wire.platform_errors import PlatformContradicts

_MOVES: Final = 64
"""So many chips are asked, one after the other."""


def find(
    site: Site, owned: OwnedVm, says: bytes | None, wishes: OwnedVm | None = None
) -> tuple[bytes | None, MyVm | None]:
    """The chip that has a VM's vTPM, or had it last, and the VM there; the keyring knows then.

    Args:
        site: of the owner.
        owned: the VM.
        says: the chip at which the platform says that it is, as `said_chip` has it.
        wishes: the same, if the chip has to meet what its owner wishes now; None: wherever it is, it shall be found.

    Raises:
        PlatformContradicts: the platform says that it was moved, and its new chip does not have it.
        ChipNotAllowed: it was moved to a chip that its owner does not want.
        SpvtpmError: a chip that has to be asked cannot be, or is none.
    """
    chip_id = locate(site, owned, says)
    if chip_id is None:
        return None, None
    here, known = site.desk(chip_id, wishes).look(owned.vm_id), vtpm_of(site.keyring, owned.vm_id)
    if here is not None or known is None:
        return chip_id, here
    trail, fate = _trail(site, known, None)
    if len(trail) == 1:
        return chip_id, None
    if fate is not None and fate.state != "here":
        return _settled(site, owned, known, trail), None
    return trail[-1], verify_came(site, owned, trail[-1], chip_id)


def locate(site: Site, owned: OwnedVm, says: bytes | None) -> bytes | None:
    """The chip that has a VM's vTPM, or had it last, after a look into what the platform says; None: it is at no chip.

    Args:
        site: of the owner.
        owned: the VM.
        says: the chip at which the platform says that it is, 16 bytes; None: it does not say.

    Raises:
        As `find`.
    """
    known = vtpm_of(site.keyring, owned.vm_id)
    chip_id = chip_where_it_lives(known, owned)
    if chip_id is None or says is None or says == chip_id:
        return chip_id
    if known is None:  # it was made there, and nobody has confirmed it
        verify_allowed(owned, says)
        return chip_id if site.desk(says, owned).look(owned.vm_id) is None else says
    trail, fate = _trail(site, known, says)
    came = says if fate is None or fate.state in ("migrated", "unknown") else trail[-1]
    if came == chip_id or (fate is not None and fate.state in ("exported", "destroyed")):
        return _settled(site, owned, known, trail)  # the platform errs, or lies
    verify_came(site, owned, came, chip_id)
    return came


def _trail(site: Site, known: Known, until: bytes | None) -> tuple[list[bytes], Fate | None]:
    """The chips through which a vTPM went, as they say, from the one that is known on; nothing is remembered.

    Args:
        site: of the owner.
        known: what is remembered of the vTPM, which is or was at a chip.
        until: the chip that need not be asked, for it will be anyway.

    Returns:
        The chips, and what the last one says; None: it does not answer, for it may be gone with its host, or is not asked.
    """
    trail: list[bytes] = []
    fate: Fate | None = None
    while isinstance(known.place, (AtChip, Exporting, Importing)) and len(trail) < _MOVES:
        chip_id = known.place.chip_id
        if chip_id in trail[-1:]:  # it knows of no other
            break
        trail.append(chip_id)
        if chip_id == until:
            return trail, None
        try:
            fate = site.desk(chip_id).ask(known.vtpm_id)
        except SpvtpmError:
            return trail, None
        known = after_fate(known, fate, chip_id) or known
    return trail, fate


def _settled(site: Site, owned: OwnedVm, known: Known, trail: list[bytes]) -> bytes | None:
    """Has the keyring remember what these chips say; the chip where the vTPM lives then, if it does."""
    for chip_id in trail:
        site.desk(chip_id).fate(known.vtpm_id)
    return chip_where_it_lives(vtpm_of(site.keyring, owned.vm_id), owned)


def verify_came(site: Site, owned: OwnedVm, chip_id: bytes, was: bytes) -> MyVm:
    """Has a chip, to which a VM is said to have been moved, confirm that it is there.

    Args:
        site: of the owner.
        owned: the VM.
        chip_id: of the chip, 16 bytes.
        was: the chip where it was, 16 bytes.

    Raises:
        ChipNotAllowed, CertificateRefused: its owner does not want that chip, or it is not genuine.
        PlatformContradicts: it does not have it.
        WrongState: it does not have it yet.
        StaleInstance: it was put back to an older state.
    """
    verify_allowed(owned, chip_id)
    desk, known = site.desk(chip_id, owned), vtpm_of(site.keyring, owned.vm_id)
    with site.keyring.moving(), desk.connect() as session:
        here = session.find(owned.vm_id)
        if here is None or known is None or here.vtpm_id != known.vtpm_id:
            raise PlatformContradicts(
                f"{owned.name} is said to have been moved to the chip {chip_id.hex()}, which does not have it; its vTPM "
                f"lived at the chip {was.hex()}"
            )
        if here.state == "arriving":
            raise WrongState(
                f"{owned.name} is still arriving at the chip {chip_id.hex()}: the platform has to end its move"
            )
        if here.version < known.newest:
            raise StaleInstance(
                f"the chip {chip_id.hex()} has version {here.version} of the vTPM of {owned.name}, and version {known.newest} "
                "was seen: it was put back to an older state"
            )
        desk.remember(session, here)
    return here


def said_chip(site: Site, owned: OwnedVm) -> bytes | None:
    """The chip at which the platform says that a VM is, 16 bytes, once no migration of it is under way; None: it says none.

    Raises:
        SpvtpmError: the platform is away.
    """
    try:
        vm = site.platform.vm(owned.vm_id)
        operation = migration_under_way(site, vm)
        if operation is not None:
            wait_for_end(site.platform, operation, site.tell)
            vm = site.platform.vm(owned.vm_id)
    except NotFound:
        return None
    return None if vm.name != owned.name or vm.chip_id is None else bytes.fromhex(vm.chip_id)


def migration_under_way(site: Site, vm: Vm) -> Operation | None:
    """The operation that moves a VM, if there is one now.

    Raises:
        SpvtpmError: the platform is away.
    """
    operation = None if vm.operation is None else site.platform.operation(vm.operation)
    return operation if operation is not None and operation.kind == "migrate" else None
