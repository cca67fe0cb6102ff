"""How a VM comes to run again at a platform: where it is, or at another place, into which its vTPM is brought from its file.

    1  the platform places it                        an operation
    2  the chip is one that its owner wants, verified
    3  the vTPM is imported there                    `imports.py`
    4  the platform starts or resumes it             an operation
    5  the chip confirms

Who comes back in between asks the keyring where the vTPM lives, and the chip that an import was under way to.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from spvtpm.files import read_file
from spvtpm.terminal.departure import release
from spvtpm.terminal.following import find, said_chip
from spvtpm.terminal.imports import import_vtpm
from spvtpm.terminal.machines import Site, chip_of, vtpm_of
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.whereabouts import AtChip, Destroyed, Exporting, Importing, InFile, Known
from spvtpm.wire.errors import CertificateRefused, NotFound, SpvtpmError, StaleInstance, WrongState
from spvtpm.wire.instance_file import MAX_FILE_BYTES, parse_instance_header
from spvtpm.wire.owner_messages import MyVm
from spvtpm.wire.platform_api import NewVm, Vm
from spvtpm.wire.platform_errors import PlatformContradicts

Beginning = Literal["start", "resume"]


def begin(site: Site, name: str, how: Beginning) -> MyVm:
    """Has a VM run: boot, or go on where it was hibernated.

    Args:
        site: of the owner.
        name: of the VM.
        how: `start` boots one that was shut down, `resume` goes on with one that was hibernated.

    Raises:
        WrongState: it is hibernated, and was to be started; or the other way round.
        SpvtpmError: not done, or not known to be done; the same again goes on.
    """
    owned = site.keyring.owned(name)
    known = _settled(site, owned)
    if isinstance(known.place, InFile):
        path = _path(known.place)
        _check_file(name, path, how)
        _bring(site, owned, path)
    chip_id, here = _look(site, owned)
    if here.state != "running":
        _check_state(name, here, how)
    if here.state != "running" or site.hear(owned).state != "running":
        site.run(site.platform.command(owned.vm_id, how))
    return site.confirm(owned, chip_id, "running")


def bring(site: Site, wanted: OwnedVm, path: Path) -> MyVm:
    """Places a VM, and brings its vTPM there out of a file. It does not run yet.

    Args:
        site: of the owner.
        wanted: the VM; one that the keyring does not have becomes the owner's with this.
        path: the instance file.

    Raises:
        SpvtpmError: not done, or not known to be done; the same again goes on.
    """
    owned = site.keyring.vm(wanted.name)
    header = parse_instance_header(read_file(path, MAX_FILE_BYTES, private=False))
    if owned is None:
        owned = wanted
        site.keyring.keep_vm(owned)
    bound = vtpm_of(site.keyring, owned.vm_id)
    if bound is not None and bound.vtpm_id != header.vtpm_id:
        raise StaleInstance(f"{owned.name} has the vTPM {bound.vtpm_id}; the file is one of {header.vtpm_id}")
    bound = None if bound is None else _asked(site, bound)
    is_there = bound is not None and isinstance(bound.place, AtChip)
    if not is_there:
        _bring(site, owned, path)
    chip_id, made = _look(site, owned)
    site.keyring.keep_vm(replace(owned, policy=made.policy, label=made.label, chip_id=chip_id, is_made=True))
    return made


def _settled(site: Site, owned: OwnedVm) -> Known:
    """What is known of its vTPM. Whatever was under way is asked after first.

    Raises:
        WrongState: it was never made whole.
        NotFound: it is no more.
    """
    known = vtpm_of(site.keyring, owned.vm_id)
    known = None if known is None else _asked(site, known)
    if known is None:
        raise WrongState(f"{owned.name} was not made whole; say `spvtpm vm create {owned.name}` again")
    if isinstance(known.place, Destroyed):
        raise NotFound(f"the vTPM of {owned.name} was destroyed")
    return known


def _asked(site: Site, known: Known) -> Known | None:
    """The same, once the chip that it was on its way to or from has told what became of it."""
    if not isinstance(known.place, (Exporting, Importing)):
        return known
    site.desk(known.place.chip_id).fate(known.vtpm_id)
    return site.keyring.known(known.vtpm_id)


def _look(site: Site, owned: OwnedVm) -> tuple[bytes, MyVm]:
    """The chip where its vTPM lives, which the platform has to name as well, and the VM there."""
    vm = site.hear(owned)
    chip_id, here = find(site, owned, said_chip(site, owned), owned)
    if chip_id is None:
        raise NotFound(f"the vTPM of {owned.name} is at no chip")
    if vm.chip_id != chip_id.hex():
        says = "away" if vm.chip_id is None else f"at the chip {vm.chip_id}"
        raise PlatformContradicts(
            f"the platform says that {owned.name} is {says}; its vTPM lives at the chip {chip_id.hex()}"
        )
    if here is None:
        raise NotFound(f"{owned.name} is not at the chip {chip_id.hex()}, where it was")
    return chip_id, here


def _bring(site: Site, owned: OwnedVm, path: Path) -> None:
    """Has the VM placed, and imports its vTPM there."""
    vm = _placed(site, owned)
    try:
        chip_id = chip_of(vm, owned)
        desk = site.desk(chip_id, owned)
        import_vtpm(desk, owned.vm_id, owned.vm_key, path, site.progress, inject_key=True)
    except CertificateRefused:
        known = vtpm_of(site.keyring, owned.vm_id)
        if known is None or isinstance(known.place, InFile):  # nothing is there
            with suppress(SpvtpmError):
                release(site, owned)
        raise
    site.keyring.drop_instance(path)  # it would be refused from now on


def _placed(site: Site, owned: OwnedVm) -> Vm:
    vm = site.hear_of(owned)
    if vm is None and not owned.is_made:  # it comes out of a file, and is new to the platform
        site.run(site.platform.create(NewVm(vm_id=owned.vm_id, name=owned.name, wants=owned.wants())))
    elif vm is None or vm.state != "placed":
        release(site, owned)  # unless that has been done
        site.run(site.platform.place(owned.vm_id, owned.wants()))
    vm = site.hear(owned)
    if vm.state != "placed":
        raise PlatformContradicts(f"the platform has placed {owned.name}, and says that it is {vm.state}")
    return vm


def _path(place: InFile) -> Path:
    if not place.path:
        raise StaleInstance("another keyring has exported this vTPM: import the file from there")
    return Path(place.path)


def _check_file(name: str, path: Path, how: Beginning) -> None:
    """Before anything is asked; the header is not authentic, but the chip is asked again."""
    header = parse_instance_header(read_file(path, MAX_FILE_BYTES, private=False))
    _check(name, header.hibernated, how)


def _check_state(name: str, here: MyVm, how: Beginning) -> None:
    _check(name, here.state == "hibernated", how)


def _check(name: str, hibernated: bool, how: Beginning) -> None:
    if hibernated and how == "start":
        raise WrongState(f"{name} is hibernated: resume it")
    if not hibernated and how == "resume":
        raise WrongState(f"{name} is not hibernated: start it")
