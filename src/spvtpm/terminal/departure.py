"""How a VM ends its run at a platform: shut down, hibernated or found after a power loss; then its vTPM comes home in a file.

    1  the platform shuts it down or hibernates it           an operation
    2  the vTPM is exported; its secure processor keeps none `exports.py`
    3  the platform lets go of its place                     an operation

Who comes back in between asks the VM's secure processor, and the keyring, how far it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from spvtpm.files import create_file, read_file
from spvtpm.terminal.exports import Exported, Output, export_vtpm
from spvtpm.terminal.following import find, said_chip
from spvtpm.terminal.machines import Site, chip_where_it_lives, vtpm_of
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.whereabouts import Destroyed, Exporting, InFile, Known
from spvtpm.wire.errors import KeyringError, NotFound, StorageError, WrongState
from spvtpm.wire.instance_file import MAX_FILE_BYTES
from spvtpm.wire.owner_messages import MyVm

Ending = Literal["shutdown", "hibernate"]
_STATE = {"shutdown": "stopped", "hibernate": "hibernated"}


def end(site: Site, name: str, how: Ending, *, stay: bool = False) -> MyVm | Exported:
    """Ends a VM's run; its vTPM comes into a file of the keyring then, unless it shall stay.

    Args:
        site: of the owner.
        name: of the VM.
        how: shut down, or hibernated.
        stay: leave it at the secure processor, for a quick start there.

    Raises:
        WrongState: it is hibernated, and was to be shut down; or the other way round.
        SpvtpmError: not done, or not known to be done; the same again goes on.
    """
    owned = site.keyring.owned(name)
    if _has_left(site, owned):
        return leave(site, owned)
    here = _end_at_chip(site, owned, how)
    return here if stay and here is not None else leave(site, owned)


def recover(site: Site, name: str, output: Path | None = None) -> Exported:
    """Brings the vTPM of a VM home that does not run any more, after a power loss say; without another boot.

    Args:
        site: of the owner.
        name: of the VM.
        output: its file; None: one of the keyring's.

    Raises:
        WrongState: it runs.
        SpvtpmError: not done, or not known to be done; the same again goes on.
    """
    owned = site.keyring.owned(name)
    if not _has_left(site, owned):
        here = _look(site, owned)
        if here is not None and here.state in ("running", "failed"):
            raise WrongState(f"{name} is {here.state}: shut it down, or hibernate it")
    return leave(site, owned, output)


def leave(site: Site, owned: OwnedVm, output: Path | None = None) -> Exported:
    """Brings a vTPM home, into a file of the keyring or another one, and has the platform let go of its place.

    Raises:
        SpvtpmError: not done, or not known to be done; the same again goes on.
    """
    known = vtpm_of(site.keyring, owned.vm_id)
    if known is not None and isinstance(known.place, InFile):
        exported = Exported(known, known.place, resumed=True)
        if output is not None:
            exported = _move(site, known, known.place, output.absolute())
    else:
        chip_id = _chip_id(site, owned)
        where: Path | Output = output or _named(site, owned.name)
        exported = export_vtpm(site.desk(chip_id), owned.vm_id, where, site.progress)
    release(site, owned)
    return exported


def release(site: Site, owned: OwnedVm) -> None:
    """Has the platform let go of the place of a VM whose vTPM is not there any more.

    Raises:
        SpvtpmError: it does not.
    """
    vm = site.hear(owned)
    if vm.state != "away":
        site.run(site.platform.command(owned.vm_id, "release"))


def _end_at_chip(site: Site, owned: OwnedVm, how: Ending) -> MyVm | None:
    """Has the run ended; the VM as its chip has it then, or None: it has left it already."""
    here = _look(site, owned)
    if here is None:
        return None
    wanted, vm = _STATE[how], site.hear(owned)
    if here.state != wanted and here.state in _STATE.values():
        raise WrongState(f"{owned.name} is {here.state}: resume or start it first, or bring it home with recover")
    if here.state != wanted or vm.state == "running":
        site.run(site.platform.command(owned.vm_id, how))
    return site.confirm(owned, _chip_id(site, owned), wanted)


def _look(site: Site, owned: OwnedVm) -> MyVm | None:
    """The VM at its chip; None: its export has ended already, only the keyring did not know."""
    _chip_id(site, owned)
    chip_id, here = find(site, owned, said_chip(site, owned))
    known = vtpm_of(site.keyring, owned.vm_id)
    if here is None and not (known is not None and isinstance(known.place, (Exporting, InFile))):
        where = "any chip" if chip_id is None else f"the chip {chip_id.hex()}, where it was"
        raise NotFound(f"{owned.name} is not at {where}")
    return here


def _chip_id(site: Site, owned: OwnedVm) -> bytes:
    known = vtpm_of(site.keyring, owned.vm_id)
    if known is not None and isinstance(known.place, Destroyed):
        raise NotFound(f"the vTPM of {owned.name} was destroyed")
    chip_id = chip_where_it_lives(known, owned)
    if chip_id is None:
        raise WrongState(f"{owned.name} was not made whole; say `spvtpm vm create {owned.name}` again")
    return chip_id


def _has_left(site: Site, owned: OwnedVm) -> bool:
    known = vtpm_of(site.keyring, owned.vm_id)
    return known is not None and isinstance(known.place, InFile)


def _named(site: Site, name: str) -> Output:
    directory = site.keyring.instances()
    return lambda version: directory / f"{name}-{version}.vtpm"


def _move(site: Site, known: Known, place: InFile, output: Path) -> Exported:
    """The file of a vTPM that has come home already is wanted elsewhere: one whole file at any moment."""
    old = Path(place.path)
    if old == output:
        return Exported(known, place, resumed=True)
    if not place.path:
        raise KeyringError("another keyring has exported this vTPM: its file is there")
    create_file(output, read_file(old, MAX_FILE_BYTES, private=False))
    place = replace(place, path=str(output))
    known = replace(known, place=place)
    site.keyring.remember(known)
    try:
        old.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {old}: {error.strerror}") from None
    return Exported(known, place, resumed=True)
