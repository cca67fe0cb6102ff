"""An import that survives a death of either side at any moment, and never gives a vTPM a second life.

    1  the file is not older than what is known, and its vTPM lives nowhere else
    2  the keyring remembers it as `importing` into this one chip      durable
    3  the file is sent; the secure processor makes the VM
    4  the keyring remembers it as `at-chip`                           durable

Who comes back between 2 and 4 asks that chip what became of it, and no other chip gets the file before it has answered.
"""

from __future__ import annotations

import hashlib
import uuid
from contextlib import suppress
from pathlib import Path

from spvtpm.files import read_file
from spvtpm.terminal.desk import Desk, find_vm
from spvtpm.terminal.session import OwnerSession, Progress, no_progress
from spvtpm.terminal.whereabouts import AtChip, Importing, InFile, Known, check_import
from spvtpm.wire.errors import MessageError, SpvtpmError, WrongInstanceKeys
from spvtpm.wire.instance_file import MAX_FILE_BYTES, InstanceHeader, parse_instance_header
from spvtpm.wire.owner_messages import MyVm


def import_vtpm(
    desk: Desk,
    vm_id: uuid.UUID,
    vm_key: bytes,
    path: Path,
    progress: Progress = no_progress,
    *,
    inject_key: bool = False,
) -> MyVm:
    """Makes a VM whose vTPM comes out of an instance file.

    Args:
        desk: at the chip where it shall live.
        vm_id: the VM.
        vm_key: 32 bytes, which the VM has as well.
        path: the file.
        progress: is told how far the transfer is.
        inject_key: whether the secure processor hands the VM key to the VM, once for each boot.

    Raises:
        StaleInstance: the file is older than what was seen, or its vTPM lives elsewhere.
        SpvtpmError: not done, or not known to be done; the same import again finishes or repeats it.
    """
    file = read_file(path, MAX_FILE_BYTES, private=False)
    header, sha256 = parse_instance_header(file), hashlib.sha256(file).digest()
    with desk.keyring.moving():
        with desk.connect() as session:
            chip_id, known = session.verified.chip_id, desk.keyring.known(header.vtpm_id)
            if known is not None and _may_be_done(known, header, chip_id):
                fate, known = desk.settle(session, header.vtpm_id)
                if fate.state == "here" and known is not None and known.vm_id == vm_id:
                    return find_vm(session, vm_id)
            check_import(known, header, sha256)
            _check_fleet(header, session)
        place = Importing(chip_id, header.version, sha256, _before(known))
        newest, label = (0, "") if known is None else (known.newest, known.label)
        known = Known(header.vtpm_id, vm_id, label, newest, place)
        desk.keyring.remember(known)
        vm = _send(desk.at(chip_id), known, vm_key, file, progress, inject_key)
        if vm.vtpm_id != header.vtpm_id:
            raise MessageError("the secure processor made another vTPM than the file's")
        newest = max(newest, header.version, vm.version)
        desk.keyring.remember(Known(header.vtpm_id, vm_id, vm.label, newest, AtChip(chip_id)))
    return vm


def _may_be_done(known: Known, header: InstanceHeader, chip_id: bytes) -> bool:
    """Whether this import was begun before, and perhaps finished, at this chip."""
    place = known.place
    if isinstance(place, AtChip):
        return place.chip_id == chip_id and known.newest == header.version
    return isinstance(place, Importing) and place.chip_id == chip_id


def _before(known: Known | None) -> InFile | None:
    return known.place if known is not None and isinstance(known.place, InFile) else None


def _check_fleet(header: InstanceHeader, session: OwnerSession) -> None:
    if header.fleet_id != session.verified.fleet_id:
        raise WrongInstanceKeys(
            f"the instance file is of the fleet {header.fleet_id.hex()}, the chip of {session.verified.fleet_id.hex()}"
        )


def _send(desk: Desk, known: Known, vm_key: bytes, file: bytes, progress: Progress, inject_key: bool) -> MyVm:
    """Has the file imported with the newest secret, or the older one that it was sealed under; a channel for each attempt."""
    secrets = desk.keyring.content.user_secrets
    for secret in secrets:
        with desk.connect() as session:
            try:
                return session.provision_import(
                    known.vm_id, secret, vm_key, file, known.newest, progress, inject_key=inject_key
                )
            except WrongInstanceKeys:
                if secret is secrets[-1]:
                    _take_back(desk, known.vtpm_id)
                    raise
            except SpvtpmError:
                if session.has_refused:
                    _take_back(desk, known.vtpm_id)
                raise
    raise AssertionError("a keyring has at least one secret")


def _take_back(desk: Desk, vtpm_id: uuid.UUID) -> None:
    """The chip has refused. It is asked what is there, rather than believed to have changed nothing."""
    with suppress(SpvtpmError), desk.connect() as session:
        desk.settle(session, vtpm_id)
