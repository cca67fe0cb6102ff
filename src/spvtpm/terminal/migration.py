"""A VM's move to another host while it runs: the platform does it, and the two secure processors say what became of it.

    1  the platform moves it                                               an operation
    2  the chip where it was says that it has given the vTPM away, if it answers
    3  the new chip, which its owner allows, verified, confirms that the VM runs there    the keyring remembers

Nothing is written down before: a terminal that comes back finds the VM where it was, or follows it (`following.py`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from spvtpm.terminal.following import find, migration_under_way, said_chip, verify_came
from spvtpm.terminal.machines import Site, chip_of, chip_where_it_lives, verify_state, vtpm_of
from spvtpm.terminal.operations import wait_for, wait_for_end
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.whereabouts import Known
from spvtpm.wire.errors import MigrationForbidden, NotFound, SpvtpmError, WrongState
from spvtpm.wire.owner_messages import Fate, MyVm
from spvtpm.wire.platform_api import Destination, Operation
from spvtpm.wire.platform_errors import PlatformContradicts

SourceSays = Literal["here", "exported", "migrated", "destroyed", "unknown", "nothing"]


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of a migration, as secure processors say.

    Attributes:
        here: the VM, where it runs now.
        chip_id: of the chip there, 16 bytes.
        source: the chip where it was before, 16 bytes; the same if it has not moved.
        source_says: what became of the vTPM there, as that chip says; `nothing`: it does not answer.
        host: where the platform says that it is now.
        was_cancelled: whether somebody did not want to wait, and the platform was asked to leave it.
    """

    here: MyVm
    chip_id: bytes
    source: bytes
    source_says: SourceSays
    host: str | None
    was_cancelled: bool

    @property
    def has_moved(self) -> bool:
        """Whether it is at another chip than before."""
        return self.chip_id != self.source


def migrate(site: Site, name: str, host: str | None = None) -> Moved:
    """Has a VM moved to another host while it runs. Who interrupts this has it cancelled, and is told what became of it.

    Args:
        site: of the owner.
        name: of the VM.
        host: which host; None: the platform chooses one. If it has moved since the keyring knew where it was, that will do.

    Raises:
        WrongState: it does not run.
        MigrationForbidden: its policy forbids it.
        PlatformContradicts: the platform says that it was moved, and its secure processor says otherwise.
        SpvtpmError: not done, or not known to be done; the same again goes on.
    """
    owned = site.keyring.owned(name)
    source = chip_where_it_lives(vtpm_of(site.keyring, owned.vm_id), owned)
    if source is None:
        raise WrongState(f"{name} is at no host: start it, and it is placed at one")
    if _joined(site, owned):
        return _outcome(site, owned, source, was_cancelled=True)
    chip_id, here = _find(site, owned)
    if host == site.hear(owned).host if host is not None else chip_id != source:
        return _outcome(site, owned, source, was_cancelled=False)
    _check(name, here)
    was_cancelled = not _done(site, owned, Destination(host=host))
    moved = _outcome(site, owned, chip_id, was_cancelled=was_cancelled)
    if not moved.has_moved and not was_cancelled:
        raise PlatformContradicts(
            f"the platform says that it has moved {name}; its secure processor, the chip {chip_id.hex()}, has it still"
        )
    if moved.has_moved and host not in (None, moved.host):
        raise PlatformContradicts(f"{name} was to move to {host}; the platform says that it is at {moved.host}")
    return moved


def _joined(site: Site, owned: OwnedVm) -> bool:
    """Waits for a migration that is under way already; whether somebody did not want to."""
    try:
        operation = migration_under_way(site, site.platform.vm(owned.vm_id))
    except NotFound:
        return False
    if operation is None:
        return False
    try:
        wait_for_end(site.platform, operation, site.tell)
    except KeyboardInterrupt:
        _cancel(site, operation)
        return True
    return False


def _done(site: Site, owned: OwnedVm, destination: Destination) -> bool:
    """Has it moved; False: somebody did not want to wait.

    Raises:
        SpvtpmError: it failed.
    """
    operation: Operation | None = None
    try:
        operation = site.platform.migrate(owned.vm_id, destination)
        wait_for(site.platform, operation, site.tell)
    except KeyboardInterrupt:
        operation = operation or migration_under_way(site, site.platform.vm(owned.vm_id))
        if operation is not None:
            _cancel(site, operation)
        return False
    return True


def _cancel(site: Site, operation: Operation) -> None:
    """Asks the platform to leave it, and waits for its end, whichever it is. Once more interrupted, waits no longer."""
    with suppress(SpvtpmError):  # it is too late, or the platform is away: its end will show
        site.platform.cancel(operation.operation_id)
    wait_for_end(site.platform, operation, site.tell)


def _find(site: Site, owned: OwnedVm) -> tuple[bytes, MyVm]:
    chip_id, here = find(site, owned, said_chip(site, owned), owned)
    if chip_id is None or here is None:
        where = "any chip" if chip_id is None else f"the chip {chip_id.hex()}, where it was"
        raise NotFound(f"{owned.name} is not at {where}")
    return chip_id, here


def _check(name: str, here: MyVm) -> None:
    """What its secure processor would refuse."""
    if here.state != "running":
        raise WrongState(
            f"{name} is {here.state}: only a VM that runs moves; another one is placed anew when it starts"
        )
    if not here.policy.migration_allowed:
        raise MigrationForbidden(f"the policy of {name} forbids that it moves while it runs")


def _outcome(site: Site, owned: OwnedVm, source: bytes, *, was_cancelled: bool) -> Moved:
    """Asks the chips what became of it.

    Raises:
        PlatformContradicts: the platform says otherwise.
    """
    vm, known = site.hear(owned), vtpm_of(site.keyring, owned.vm_id)
    chip_id, fate = chip_of(vm, owned), _fate(site, source, known)
    if chip_id != source:
        if fate is not None and fate.state not in ("migrated", "unknown"):
            raise PlatformContradicts(
                f"the platform says that {owned.name} is at the chip {vm.chip_id}; the chip {source.hex()}, where its vTPM "
                f"lived, has not given it to another one: {fate.state} there"
            )
        came = verify_came(site, owned, chip_id, source)  # now the keyring knows, and not before: who dies asks again
        here = verify_state(owned, came, "running")
    else:
        here = site.confirm(owned, chip_id, "running")
    return Moved(here, chip_id, source, "nothing" if fate is None else fate.state, vm.host, was_cancelled)


def _fate(site: Site, chip_id: bytes, known: Known | None) -> Fate | None:
    """What a chip says became of a vTPM there; None: it does not answer, for it may be gone with its host."""
    if known is None:
        return None
    with suppress(SpvtpmError):
        return site.desk(chip_id).ask(known.vtpm_id)
    return None
