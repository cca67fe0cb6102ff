"""The end of a VM at a platform: its vTPM destroyed by its owner through the channel, then its place, and last its key."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from spvtpm.terminal.following import find, said_chip
from spvtpm.terminal.machines import Site, vtpm_of
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.whereabouts import Destroyed, InFile
from spvtpm.wire.errors import WrongState


def destroy(site: Site, name: str, *, chip_lost: bool = False) -> None:
    """Destroys a VM, for good, wherever its vTPM lives.

    Args:
        site: of the owner.
        name: of the VM.
        chip_lost: its chip is gone for ever, so it is not asked. If it ever comes back, the vTPM is there still.

    Raises:
        SpvtpmError: not done, or not known to be done; the same again goes on.
    """
    owned = site.keyring.owned(name)
    if not chip_lost:
        _destroy_at_chip(site, owned)
    known = vtpm_of(site.keyring, owned.vm_id)
    if known is not None and not isinstance(known.place, Destroyed):
        site.keyring.remember(replace(known, place=Destroyed()))
        if isinstance(known.place, InFile) and known.place.path:
            site.keyring.drop_instance(Path(known.place.path))
    if site.hear_of(owned) is not None:
        site.run(site.platform.destroy(owned.vm_id))
    site.keyring.drop_vm(owned.vm_id)


def _destroy_at_chip(site: Site, owned: OwnedVm) -> None:
    """At the chip where it lives. What is gone there already is asked after: perhaps it is in a file."""
    chip_id, here = find(site, owned, said_chip(site, owned))
    if chip_id is None:
        return
    known = vtpm_of(site.keyring, owned.vm_id)
    if here is not None:
        site.desk(chip_id).destroy(owned.vm_id)
    elif known is not None:
        fate = site.desk(chip_id).fate(known.vtpm_id)
        if fate.state in ("here", "migrated"):
            raise WrongState(f"{owned.name} was moved meanwhile, and lives: say it again")
