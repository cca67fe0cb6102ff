"""What the terminal remembers of a vTPM, and what follows from what secure processors say of it. Pure: no files, no sockets.

A secure processor keeps a ledger, but only its own. The owner's terminal is the one place that knows in which version, and
where, a vTPM lives; so it refuses an older file, and a second life of a vTPM that lives already (B3).

    at-chip --export--> exporting --acknowledged--> in-file --import--> importing --made--> at-chip
                           |                            ^                   |
                           +-- exported again           +---- not made -----+

`exporting` and `importing` are written down before the step that they stand for, so that a terminal that died in between
knows what to ask. What a chip answers counts because the channel showed that it is genuine.

A running vTPM may be handed from chip to chip, by others than its owner; nothing is written down before. The chip that has
given it away says to which one, and that one says that it has it.
"""

from __future__ import annotations

import uuid
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from spvtpm.wire.certificate_extensions import CHIP_ID_BYTES
from spvtpm.wire.errors import StaleInstance
from spvtpm.wire.instance_content import Label
from spvtpm.wire.instance_header import MAX_INSTANCE_VERSION, InstanceHeader
from spvtpm.wire.owner_messages import Fate

MAX_PATH_CHARACTERS = 4096
"""Source: Linux, limits.h, PATH_MAX."""

_ChipId = Annotated[bytes, Meta(min_length=CHIP_ID_BYTES, max_length=CHIP_ID_BYTES)]
_Version = Annotated[int, Meta(ge=0, le=MAX_INSTANCE_VERSION)]
_Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Path = Annotated[str, Meta(max_length=MAX_PATH_CHARACTERS)]


class AtChip(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="at-chip"):
    """It lives in a secure processor.

    Attributes:
        chip_id: of its chip, 16 bytes.
    """

    chip_id: _ChipId


class InFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="in-file"):
    """It lives in an instance file, and nowhere else.

    Attributes:
        version: of the instance.
        sha256: of the file, 32 bytes.
        path: where the file was written; empty if another keyring of this owner exported it.
    """

    version: _Version
    sha256: _Sha256
    path: _Path


class Exporting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="exporting"):
    """A file of it was received whole, and its chip has not confirmed yet that nothing is left there.

    Attributes:
        chip_id: of the chip, 16 bytes.
        version: of the instance.
        sha256: of the file, 32 bytes.
        path: where the file is, or was about to be written. Void for as long as the chip still has the vTPM.
    """

    chip_id: _ChipId
    version: _Version
    sha256: _Sha256
    path: _Path


class Importing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="importing"):
    """A file of it is being sent to a chip that has not confirmed it yet.

    Attributes:
        chip_id: of the chip, 16 bytes.
        version: as the file's header has it; nobody has checked it yet.
        sha256: of the file, 32 bytes.
        before: what was known before; None: nothing.
    """

    chip_id: _ChipId
    version: _Version
    sha256: _Sha256
    before: InFile | None


class Destroyed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="destroyed"):
    """It was destroyed without an export, at its owner's word."""


Place = AtChip | InFile | Exporting | Importing | Destroyed


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is remembered of one vTPM.

    Attributes:
        vtpm_id: its id.
        vm_id: the VM that it was last bound to.
        label: the owner's words for it.
        newest: version that any secure processor has told of it, 0 if none; never falls.
        place: where it lives.
    """

    vtpm_id: uuid.UUID
    vm_id: uuid.UUID
    label: Label
    newest: _Version
    place: Place


def after_fate(known: Known, fate: Fate, chip_id: bytes) -> Known | None:
    """What is to be remembered once a chip has told of a vTPM; None: nothing, as before the import that it refused.

    Args:
        known: what is remembered.
        fate: what the chip says of the same vTPM.
        chip_id: the chip's, 16 bytes.
    """
    known = replace(known, newest=max(known.newest, fate.version))
    place = known.place
    if fate.state == "here":
        still = isinstance(place, Exporting)
        return replace(known, place=replace(place, chip_id=chip_id) if still else AtChip(chip_id))
    if isinstance(place, (InFile, Destroyed)) or place.chip_id != chip_id:
        return known  # an older story: it has left this chip since
    if fate.state == "destroyed":
        return replace(known, place=Destroyed())
    if isinstance(place, Importing) and _never_came(place, fate):
        before = place.before or _exported(place, fate)
        return None if before is None else replace(known, place=before)
    if fate.state == "migrated" and fate.chip is not None:
        return replace(known, place=_handed_on(place, fate.chip))
    return replace(known, place=_exported(place, fate) or place)


def _handed_on(place: AtChip | Exporting | Importing, chip_id: bytes) -> AtChip | Exporting:
    """At another chip. A file of it that nobody has confirmed is void there, too, and still to be removed."""
    return replace(place, chip_id=chip_id) if isinstance(place, Exporting) else AtChip(chip_id)


def _never_came(place: Importing, fate: Fate) -> bool:
    """Whether what the chip tells is older than the import, if it tells anything."""
    return fate.state == "unknown" or fate.version < place.version or fate.sha256 == place.sha256


def _exported(place: AtChip | Exporting | Importing, fate: Fate) -> InFile | None:
    """The file that the chip has given away the vTPM in, if it has."""
    if fate.state != "exported" or fate.sha256 is None:
        return None
    ours = isinstance(place, Exporting) and place.sha256 == fate.sha256
    return InFile(fate.version, fate.sha256, place.path if ours and isinstance(place, Exporting) else "")


def void_file(before: Place, now: Place) -> str:
    """The file that a chip has taken the vTPM out of, as turns out now: path; empty: none."""
    if isinstance(before, Importing) and before.before is not None and isinstance(now, AtChip):
        return before.before.path
    return ""


def check_import(known: Known | None, header: InstanceHeader, sha256: bytes) -> None:
    """Whether a file may be imported, as far as the terminal knows.

    Args:
        known: what is remembered of the file's vTPM.
        header: of the file; the secure processor will check it.
        sha256: of the whole file, 32 bytes.

    Raises:
        StaleInstance: it is older than what was seen, or the vTPM lives elsewhere, or is no more.
    """
    if known is None:
        return
    place, name = known.place, f"vTPM {header.vtpm_id}"
    if header.version < known.newest:
        raise StaleInstance(
            f"the instance file is version {header.version} of {name}; expected was {known.newest} or newer"
        )
    if isinstance(place, AtChip):
        raise StaleInstance(f"{name} lives at the chip {place.chip_id.hex()}; export it there first")
    if isinstance(place, Exporting):
        raise StaleInstance(
            f"the export of {name} from the chip {place.chip_id.hex()} has not ended; finish it there with the same export"
        )
    if isinstance(place, Importing):
        raise StaleInstance(
            f"an import of {name} into the chip {place.chip_id.hex()} was broken off; ask there first what became of it"
        )
    if isinstance(place, Destroyed):
        raise StaleInstance(f"{name} was destroyed")
    if header.version == place.version == known.newest and sha256 != place.sha256:
        raise StaleInstance(
            f"the instance file says that it is version {header.version} of {name}, but is not the file that was exported"
        )


def describe(place: Place) -> str:
    """Where it lives, in words."""
    match place:
        case AtChip():
            return f"at the chip {place.chip_id.hex()}"
        case InFile():
            return f"in the file {place.path}" if place.path else "in a file that another keyring has exported"
        case Exporting():
            return f"at the chip {place.chip_id.hex()}, its export to {place.path} not finished"
        case Importing():
            return f"import into the chip {place.chip_id.hex()} not confirmed"
        case Destroyed():
            return "destroyed"
