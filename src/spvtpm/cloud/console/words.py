"""How times, ids and commands are written on a page, and what states mean. The console's pages come in."""

from __future__ import annotations

import shlex
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup

from spvtpm.wire.platform_api import Vm

_SHOWN_OF_ID: Final = 8
_UNITS: Final = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))

VM_STATES: Final = {
    "placed": "It has a host; its owner has still to provision it or to boot it.",
    "running": "Its machine runs.",
    "stopped": "It is off; its vTPM is at the host's secure processor.",
    "hibernated": "It sleeps; its vTPM is at the host's secure processor.",
    "failed": "It is not as it was ordered.",
    "away": "It has no host; its owner has its vTPM.",
}
RESIDENCIES: Final = {
    "": "none here: there is none yet, or its owner has it",
    "active": "active: a process of its own in the secure processor",
    "parked": "parked: sealed in the secure processor's memory, back at the next command",
    "halted": "halted: the VM is moving, and goes on here or at the host that it moves to",
    "off": "off: sealed in the secure processor's storage",
    "failed": "failed: its process died; the next boot brings it back",
}


def when(seconds: float) -> Markup:
    """A time of the past, relative, with the exact one as its title."""
    return _time(seconds, ago(time.time() - seconds))


def end(seconds: float | None) -> Markup:
    """When something ends, or did; None: never."""
    if seconds is None:
        return Markup("never")
    left = seconds - time.time()
    return _time(seconds, f"in {duration(left)}" if left > 0 else f"ended {ago(-left)}")


def _time(seconds: float, words: str) -> Markup:
    return Markup('<time datetime="{0}" title="{0}">{1}</time>').format(exactly(seconds), words)


def exactly(seconds: float) -> str:
    """A time, as ISO 8601 has it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def ago(seconds: float) -> str:
    """How long ago, in the largest unit that fits; clocks differ, so a little of the future is now."""
    if seconds < 1:
        return "now"
    return f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """So long, in the largest unit that fits."""
    name, size = next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])
    return f"{int(seconds // size)} {name}"


def identity(value: uuid.UUID | str) -> Markup:
    """An id, shortened, with the whole of it as its title."""
    text = str(value)
    return Markup('<code class="id" title="{}">{}…</code>').format(text, text[:_SHOWN_OF_ID])


def by_number(indices: Iterable[str]) -> list[str]:
    """Indices of PCRs, as numbers are ordered."""
    return sorted(indices, key=int)


def is_untouched(value: str) -> bool:
    """Whether a PCR has what it has after a reset, all zeros or all ones, so that nothing was measured into it."""
    return set(value) in ({"0"}, {"f"})


def commands_for(vm: Vm) -> list[tuple[str, str]]:
    """What the VM's owner can type in his terminal now, and what it is for."""
    name = shlex.quote(vm.name)
    at_a_host = [
        (f"spvtpm vm shutdown {name}", "shut down, and have the vTPM at home"),
        (f"spvtpm vm recover {name}", "have the vTPM at home without another boot"),
    ]
    offers = {
        "placed": [(f"spvtpm vm start {name}", "provision it if that is still to be done, and boot it")],
        "running": [
            (f"spvtpm vm exec {name} -- tpm2_pcrread", "run a command in the VM"),
            (f"spvtpm vm publish-pcrs {name}", "show its PCR values here"),
            at_a_host[0],
            (f"spvtpm vm hibernate {name}", "put it to sleep, and have the vTPM at home"),
        ],
        "stopped": [(f"spvtpm vm start {name}", "boot it again"), at_a_host[1]],
        "hibernated": [(f"spvtpm vm resume {name}", "go on where it was put to sleep"), at_a_host[1]],
        "failed": [(f"spvtpm vm start {name}", "boot it again"), at_a_host[1]],
        "away": [
            (f"spvtpm vm resume {name}", "bring the vTPM to a host, and go on where it was put to sleep")
            if vm.has_image
            else (f"spvtpm vm start {name}", "bring the vTPM to a host, and boot")
        ],
    }
    return [*offers.get(vm.state, []), (f"spvtpm vm show {name}", "what the chip itself says: it alone counts")]
