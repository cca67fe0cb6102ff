"""What the platform says beside what the keyring and verified secure processors say; where they differ, in words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from spvtpm.terminal.attestation import Verified
from spvtpm.terminal.following import find
from spvtpm.terminal.machines import Site, chip_where_it_lives, vtpm_of
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.whereabouts import Destroyed, InFile, Known
from spvtpm.wire.errors import NotFound, SpvtpmError
from spvtpm.wire.owner_messages import MyVm
from spvtpm.wire.platform_api import Chip, Vm


@dataclass(frozen=True, slots=True)
class Line:
    """One VM, or what the platform takes for one.

    Attributes:
        name: in the keyring; the platform's for what the keyring does not have.
        owned: what the keyring has.
        known: what it knows of the vTPM.
        says: what the platform says of this id; None: it does not list it.
        differences: sentences; empty: all agree.
    """

    name: str
    owned: OwnedVm | None
    known: Known | None
    says: Vm | None
    differences: list[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One VM, looked at closely.

    Attributes:
        line: the platform and the keyring.
        here: what its secure processor says; None: it has no such VM, or there is none to ask, or it cannot be asked.
        chip: the chip that was asked, verified.
        silence: why it could not be asked.
    """

    line: Line
    here: MyVm | None
    chip: Verified | None
    silence: SpvtpmError | None


@dataclass(frozen=True, slots=True)
class SeenChip:
    """A chip of the platform.

    Attributes:
        says: what the platform says.
        verified: what its own channel has shown.
        refusal: why there is no such channel.
    """

    says: Chip
    verified: Verified | None
    refusal: SpvtpmError | None


def list_all(site: Site) -> list[Line]:
    """All VMs, by name: those of the keyring, and those that the platform lists and the keyring does not have.

    Raises:
        SpvtpmError: the platform's refusal; or it is away.
    """
    said = {vm.vm_id: vm for vm in site.platform.vms()}
    mine = {owned.vm_id: owned for owned in site.keyring.content.vms}
    lines = [_line(site, owned, said.get(owned.vm_id)) for owned in mine.values()]
    names = {owned.name for owned in mine.values()}
    for vm in said.values():
        if vm.vm_id not in mine:
            taken = ", under a name that it gives to another VM" if vm.name in names else ""
            lines.append(Line(vm.name, None, None, vm, [f"your keyring has no VM {vm.vm_id}{taken}"]))
    return sorted(lines, key=lambda line: line.name)


def compare(site: Site, name: str) -> Comparison:
    """One VM of the keyring, with what its secure processor says of it.

    Raises:
        NotFound: the keyring has none of this name.
        SpvtpmError: the platform's refusal; or it is away.
    """
    owned = site.keyring.owned(name)
    try:
        says: Vm | None = site.platform.vm(owned.vm_id)
    except NotFound:
        says = None
    is_settled = says is not None and says.name == name and says.operation is None
    said = bytes.fromhex(says.chip_id) if says is not None and says.chip_id is not None and is_settled else None
    seen: list[Verified] = []

    def tell(verified: Verified) -> None:
        seen.append(verified)
        site.tell_verified(verified)

    chip_id, here, silence = None, None, None
    try:
        chip_id, here = find(dataclasses.replace(site, tell_verified=tell), owned, said)
    except SpvtpmError as error:
        silence = error
    line = _line(site, owned, says)
    if silence is None and chip_id is not None:
        line.differences.extend(_against_chip(name, says, here))
    return Comparison(line, here, seen[-1] if seen and silence is None else None, silence)


def survey(site: Site) -> list[SeenChip]:
    """The platform's chips, each asked through the relay who it is.

    Raises:
        SpvtpmError: the platform's refusal; or it is away.
    """
    seen = []
    for chip in site.platform.chips():
        try:
            with site.desk(bytes.fromhex(chip.chip_id)).connect() as session:
                seen.append(SeenChip(chip, session.verified, None))
        except SpvtpmError as error:
            seen.append(SeenChip(chip, None, error))
    return seen


def _line(site: Site, owned: OwnedVm, says: Vm | None) -> Line:
    known = vtpm_of(site.keyring, owned.vm_id)
    return Line(owned.name, owned, known, says, _against_keyring(owned, known, says))


def _against_keyring(owned: OwnedVm, known: Known | None, says: Vm | None) -> list[str]:
    """What the platform says against the keyring, but for what an operation under way may explain."""
    if says is None:
        again = "" if owned.is_made else f"; `spvtpm vm create {owned.name}` again makes it whole"
        return [f"the platform does not know {owned.name}, which your keyring has{again}"]
    found = []
    if says.name != owned.name:
        found.append(f"the platform calls it {says.name}")
    if known is None or says.operation is not None:
        return found
    chip_id = chip_where_it_lives(known, owned)
    if chip_id is not None and says.chip_id != chip_id.hex():
        place = "away" if says.chip_id is None else f"at the chip {says.chip_id}"
        found.append(f"the platform says that it is {place}; your keyring knows its vTPM at the chip {chip_id.hex()}")
    if isinstance(known.place, (InFile, Destroyed)) and says.state not in ("away", "placed"):
        place = "in a file" if isinstance(known.place, InFile) else "destroyed"
        found.append(f"the platform says that it is {says.state}; your keyring knows its vTPM {place}")
    if says.vtpm_id is not None and says.vtpm_id != known.vtpm_id:
        found.append(f"the platform says that its vTPM is {says.vtpm_id}; your keyring knows {known.vtpm_id}")
    return found


def _against_chip(name: str, says: Vm | None, here: MyVm | None) -> list[str]:
    """What the platform says against the secure processor."""
    if here is None:
        return [f"its secure processor has no {name}"]
    if says is None or says.operation is not None:
        return []
    agree = {"placed": ("stopped", "hibernated"), "failed": ("failed", "stopped", "hibernated"), "away": ()}
    if here.state not in agree.get(says.state, (says.state,)):
        return [f"the platform says that it is {says.state}; its secure processor says {here.state}"]
    return []
