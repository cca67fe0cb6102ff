"""An export that survives a death of either side at any moment: afterwards exactly one of secure processor and file counts.

    1  the whole file is here, in memory, and is what was announced
    2  the keyring remembers it as `exporting`           durable
    3  the file is written                               durable
    4  acknowledged: the secure processor destroys what it has
    5  the keyring remembers it as `in-file`             durable

Until 4 the vTPM lives in the secure processor, whatever files there are. Who comes back between 2 and 5 asks what became of it:
exported means that 3 had happened, and 5 is all that is left to do; here means that the file is void, and all begins again under
a new version.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spvtpm.files import create_file, read_file, sync_directory
from spvtpm.terminal.desk import Desk, find_vm
from spvtpm.terminal.session import OwnerSession, Progress, ReceivedFile, no_progress
from spvtpm.terminal.whereabouts import Exporting, InFile, Known
from spvtpm.wire.errors import (
    AlreadyExists,
    InstanceFileError,
    KeyringError,
    NotFound,
    SpvtpmError,
    StaleInstance,
    StorageError,
    UsageError,
)
from spvtpm.wire.instance_file import MAX_FILE_BYTES, parse_instance_header
from spvtpm.wire.owner_messages import MyVm


@dataclass(frozen=True, slots=True)
class Exported:
    """A vTPM that lives in a file now.

    Attributes:
        known: what is remembered of it.
        file: where it lives.
        resumed: whether an earlier export had got so far; then the file is where that one was told to write it.
    """

    known: Known
    file: InFile
    resumed: bool


Output = Callable[[int], Path]
"""Where the file of a version shall be."""


def export_vtpm(desk: Desk, vm_id: uuid.UUID, output: Path | Output, progress: Progress = no_progress) -> Exported:
    """Brings the vTPM of a stopped or hibernated VM into a file; its secure processor keeps nothing of it.

    Args:
        desk: at the chip where it lives.
        vm_id: the VM.
        output: the file, or what names it by its version; must not exist, unless an export to it was broken off.
        progress: is told how far the transfer is.

    Raises:
        SpvtpmError: not done, or not known to be done; the same export again finishes or repeats it.
    """
    with desk.keyring.moving(), desk.connect() as session:
        before = _last(desk, vm_id, Exporting)
        finished = None if before is None else _settle(desk, session, before)
        if finished is not None:
            return finished
        vm = _present(desk, session, vm_id)
        if isinstance(vm, Exported):
            return vm
        _check_output(_path(output, vm.version + 1), before)
        received = session.export(vm_id, progress)
        path = _path(output, received.begins.version)
        _check_output(path, before)
        known = _exporting(desk, session, vm, received, path)
        if before is not None and isinstance(before.place, Exporting):
            _remove_void(before.place)
        desk.keyring.remember(known)
        create_file(path, received.content)
        session.acknowledge(vm_id, received)
        file = InFile(received.begins.version, received.sha256, str(path))
        known = Known(known.vtpm_id, vm_id, known.label, known.newest, file)
        desk.keyring.remember(known)
    return Exported(known, file, resumed=False)


def _path(output: Path | Output, version: int) -> Path:
    return (output if isinstance(output, Path) else output(version)).absolute()


def _last(desk: Desk, vm_id: uuid.UUID, kind: type[Exporting | InFile]) -> Known | None:
    """What is remembered of a vTPM of this VM that is at such a place; of several, the one remembered last."""
    of_vm = (known for known in desk.keyring.content.vtpms if known.vm_id == vm_id)
    return next((known for known in reversed(list(of_vm)) if isinstance(known.place, kind)), None)


def _settle(desk: Desk, session: OwnerSession, before: Known) -> Exported | None:
    """What became of an export that was broken off; None: the vTPM is here, so that it can be exported anew."""
    fate, known = desk.settle(session, before.vtpm_id)
    if fate.state == "here":
        return None
    if known is None or not isinstance(known.place, InFile):
        chip = f"the chip {session.verified.chip_id.hex()}"
        raise NotFound(
            f"{chip} does not have the vTPM {before.vtpm_id}, whose export was broken off: {fate.state} there"
        )
    return _finished(known, known.place)


def _present(desk: Desk, session: OwnerSession, vm_id: uuid.UUID) -> MyVm | Exported:
    """The VM; or the export by which it has left already.

    Raises:
        NotFound: neither.
    """
    try:
        return find_vm(session, vm_id)
    except NotFound:
        left = _last(desk, vm_id, InFile)
        if left is None or not isinstance(left.place, InFile):
            raise
        if session.ask_fate(left.vtpm_id).sha256 != left.place.sha256:
            raise
        return _finished(left, left.place)


def _finished(known: Known, place: InFile) -> Exported:
    if not place.path:
        raise StaleInstance(f"another keyring has exported the vTPM {known.vtpm_id}, as version {place.version}")
    if _sha256_of(Path(place.path)) != place.sha256:
        raise KeyringError(f"{place.path} is not the file that was exported, and nothing else is left of the vTPM")
    return Exported(known, place, resumed=True)


def _check_output(output: Path, before: Known | None) -> None:
    """Whether a file may be made there; a void one, which an export has left that was broken off, counts as none."""
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise UsageError("the keyring cannot remember this path: it is no UTF-8") from None
    if not output.parent.is_dir():
        raise StorageError(f"there is no directory {output.parent}")
    if output.exists() or output.is_symlink():
        if before is None or not isinstance(before.place, Exporting):
            raise AlreadyExists(f"{output} exists already")
        if before.place.path != str(output) or not _is_as_left(before.place):
            raise AlreadyExists(f"{output} exists already")


def _exporting(desk: Desk, session: OwnerSession, vm: MyVm, received: ReceivedFile, output: Path) -> Known:
    """What is to be remembered of a file that came whole.

    Raises:
        InstanceFileError: its header says something else than was announced.
        StaleInstance: its version is not newer than all that were seen: the secure processor was put back to an older state.
    """
    begins, header = received.begins, parse_instance_header(received.content)
    told = (header.vtpm_id, header.version, header.hibernated, header.vm_id, header.fleet_id)
    if told != (begins.vtpm_id, begins.version, begins.hibernated, vm.vm_id, session.verified.fleet_id):
        raise InstanceFileError("the header of the file that came is not that of what was asked for")
    old = desk.keyring.known(begins.vtpm_id)
    if old is not None and begins.version <= old.newest:
        raise StaleInstance(
            f"the secure processor gives version {begins.version} of vTPM {begins.vtpm_id}, and version {old.newest} was "
            "seen: it was put back to an older state"
        )
    place = Exporting(session.verified.chip_id, begins.version, received.sha256, str(output))
    return Known(begins.vtpm_id, vm.vm_id, vm.label, begins.version, place)


def _remove_void(place: Exporting) -> None:
    """Takes away what an export left that was broken off; the vTPM is in its secure processor. A file that changed stays."""
    if _is_as_left(place):
        path = Path(place.path)
        try:
            path.unlink()
            sync_directory(path.parent)
        except OSError as error:
            raise StorageError(f"cannot remove {path}: {error.strerror}") from None


def _is_as_left(place: Exporting) -> bool:
    return _sha256_of(Path(place.path)) == place.sha256


def _sha256_of(path: Path) -> bytes:
    """Of an instance file; nothing if there is none."""
    try:
        return hashlib.sha256(read_file(path, MAX_FILE_BYTES, private=False)).digest()
    except SpvtpmError:
        return b""
