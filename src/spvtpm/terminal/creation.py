"""Making a VM at a platform: placed by the platform, provisioned by its owner through the channel, then started.

    1  the keyring has name, id and VM key                        durable
    2  the platform places it                                     an operation
    3  the keyring knows the chip that it is about to be made at  durable
    4  provisioned there, in the confidential channel
    5  the platform starts it                                     an operation
    6  the chip confirms; the keyring knows where the vTPM lives  durable

Who comes back in between asks the platform whether 2, and that one chip whether 4 has happened.
"""

from __future__ import annotations

from contextlib import suppress

from msgspec.structs import replace

from spvtpm.terminal.following import locate
from spvtpm.terminal.machines import Site, chip_of
from spvtpm.terminal.owned import OwnedVm
from spvtpm.wire.errors import AlreadyExists, CertificateRefused, PcrBankUnknown, SpvtpmError
from spvtpm.wire.owner_messages import MyVm
from spvtpm.wire.platform_api import NewVm, Vm
from spvtpm.wire.platform_errors import PlatformContradicts


def create(site: Site, wanted: OwnedVm) -> MyVm:
    """Makes a VM with a new vTPM, and starts it.

    Args:
        site: of the owner.
        wanted: how it shall be, with a new id and a new key; what was begun under its name before keeps its own.

    Raises:
        AlreadyExists: there is one of this name, or one was begun that shall be otherwise.
        SpvtpmError: not done, or not known to be done; the same again goes on.
    """
    owned = _begun(site, wanted)
    vm = _placed(site, owned)
    chip_id = _chip(site, owned, vm)
    _provision(site, owned, chip_id)
    if vm.state != "running":
        site.run(site.platform.command(owned.vm_id, "start"))
    made = site.confirm(owned, chip_id, "running")
    site.keyring.keep_vm(replace(owned, chip_id=chip_id, is_made=True))
    return made


def _begun(site: Site, wanted: OwnedVm) -> OwnedVm:
    """What the keyring has of the VM."""
    before = site.keyring.vm(wanted.name)
    if before is None:
        site.keyring.keep_vm(wanted)
        return wanted
    if before.is_made:
        raise AlreadyExists(f"there is a VM {wanted.name} already")
    if replace(wanted, vm_id=before.vm_id, vm_key=before.vm_key, chip_id=before.chip_id) != before:
        raise AlreadyExists(f"a VM {wanted.name} was begun with other options; give those, or destroy it first")
    return before


def _placed(site: Site, owned: OwnedVm) -> Vm:
    vm = site.hear_of(owned)
    if vm is not None:
        return vm
    try:
        site.run(site.platform.create(NewVm(vm_id=owned.vm_id, name=owned.name, wants=owned.wants())))
        return site.hear(owned)
    except SpvtpmError:
        _give_up(site, owned)
        raise


def _give_up(site: Site, owned: OwnedVm) -> None:
    """Where nothing was begun, nothing is kept: the name is free again."""
    with suppress(SpvtpmError):
        if owned.chip_id is None and site.hear_of(owned) is None:
            site.keyring.drop_vm(owned.vm_id)


def _chip(site: Site, owned: OwnedVm, vm: Vm) -> bytes:
    """The chip where it shall be made, or was about to be; verified. If none was, and that one will not do, all is undone."""
    try:
        chip_id = chip_of(vm, owned)
        begun = locate(site, owned, chip_id)
        if begun is not None and begun != chip_id:
            raise PlatformContradicts(
                f"{owned.name} was begun at the chip {begun.hex()}; the platform says that it is at {vm.chip_id}"
            )
        site.desk(chip_id, owned).connect().close()
    except CertificateRefused:
        if owned.chip_id is None:
            _undo(site, owned)
        raise
    return chip_id


def _undo(site: Site, owned: OwnedVm) -> None:
    """Gives the place back, and frees the name, where no chip has anything of the VM."""
    with suppress(SpvtpmError):
        site.run(site.platform.destroy(owned.vm_id))
        site.keyring.drop_vm(owned.vm_id)


def _provision(site: Site, owned: OwnedVm, chip_id: bytes) -> None:
    site.keyring.keep_vm(replace(owned, chip_id=chip_id))
    desk = site.desk(chip_id, owned)
    if desk.look(owned.vm_id) is None:
        try:
            desk.provision(owned.vm_id, owned.vm_key, owned.policy, owned.label, inject_key=True)
        except PcrBankUnknown:  # the chip's own word, which has nothing of it
            _undo(site, owned)
            raise
