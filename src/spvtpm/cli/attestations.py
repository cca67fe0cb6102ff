"""`spvtpm vm attest`: its options, and its result in words and as JSON. `cli/vm.py` comes in."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from spvtpm.cli.parts import print_json

if TYPE_CHECKING:
    from spvtpm.terminal.appraisal import Expected, JudgedPcr
    from spvtpm.terminal.attestation import Verified
    from spvtpm.terminal.machines import Site
    from spvtpm.terminal.vm_attestation import Attested
    from spvtpm.wire.event_log import Event

REFUSED: Final = 3
"""Exit code, as of a `PolicyError`."""

_COLUMNS: Final = 80
_MARKS: Final = {True: "as expected", False: "NOT as expected", None: ""}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked of a vTPM.

    Attributes:
        pcrs: which PCRs are quoted.
        policy: a file with the values that will do.
        event_log: whether the firmware's log is read, too.
        event_log_path: where the VM has it.
    """

    pcrs: Annotated[
        str | None,
        Parameter(help="PCRs to be quoted, such as sha256:0,1,2,7. [default: those of --policy, or sha256:0 to 15]"),
    ] = None
    policy: Annotated[Path | None, Parameter(help="A JSON file with the PCR values that you expect.")] = None
    event_log: Annotated[
        bool, Parameter(negative="", help="Read the firmware's event log in the VM, and compare it with the quote.")
    ] = False
    event_log_path: Annotated[
        str | None, Parameter(help="Where the VM has that log. [default: where Linux has it, of tpm0]")
    ] = None

    def expected(self) -> Expected | None:
        """What the policy file says; None: there is none."""
        from spvtpm.files import read_file
        from spvtpm.terminal.appraisal import MAX_POLICY_BYTES, parse_policy

        return None if self.policy is None else parse_policy(read_file(self.policy, MAX_POLICY_BYTES, private=False))

    def ask(self, site: Site, name: str, expected: Expected | None) -> Attested:
        """Asks."""
        from spvtpm.cli.vm_parts import tell_waiting
        from spvtpm.terminal.appraisal import selection_of
        from spvtpm.terminal.vm_attestation import EVENT_LOG, attest

        selection = selection_of(self.pcrs, expected)
        log_path = self.event_log_path or (EVENT_LOG if self.event_log else None)
        return attest(site, name, selection, expected, log_path, tell_waiting=lambda: tell_waiting(name))


def print_attested(attested: Attested, json: bool) -> None:
    if json:
        print_json(_as_dict(attested))
        return
    appraisal, endorsed, quote = attested.appraisal, attested.endorsed, attested.evidence.quote
    print(f"{attested.owned.name}: {appraisal.verdict}")
    for reason in appraisal.reasons:
        print(f"  ! {reason}")
    _tell(
        "attester", f"vTPM {endorsed.vtpm_id}, at chip {endorsed.here.chip_id.hex()}{_path(endorsed.direct_path_only)}"
    )
    _tell("endorser", f"{endorsed.endorser}")
    _tell("evidence", "a quote for a new nonce by a new key of this vTPM, found by activating a credential for its EK")
    _tell(
        "clock",
        f"{_uptime(quote.clock_ms)} in use; resets {quote.reset_count}, restarts {quote.restart_count}{_safe(quote.safe)}",
    )
    _tell("verifier", _verdict(attested))
    for bank in attested.evidence.pcrs:
        print(f"  PCRs of {bank}")
        for pcr in appraisal.pcrs:
            if pcr.bank == bank:
                _print_pcr(pcr)
    if attested.log is not None:
        print(f"  event log: {len(attested.log.events)} events; in brackets: words that were not measured themselves")
        for event in attested.log.events:
            _print_event(event)


def refuse(attested: Attested) -> None:
    """Ends this process if the verdict is no good one."""
    if attested.appraisal.verdict == "refused":
        sys.exit(REFUSED)


def _verdict(attested: Attested) -> str:
    return {
        "trusted": "this terminal; the PCRs are as its policy has it",
        "genuine": "this terminal; no PCR was expected to have any value: it is up to you (--policy)",
        "refused": "this terminal; do not rely on this VM",
    }[attested.appraisal.verdict]


def _tell(heading: str, words: str) -> None:
    lines = textwrap.wrap(words, _COLUMNS - 12, break_on_hyphens=False)
    print(f"  {heading:10}{lines[0]}")
    for line in lines[1:]:
        print(" " * 12 + line)


def _print_pcr(pcr: JudgedPcr) -> None:
    lines = textwrap.wrap(pcr.value.hex(), 64)
    print(f"    {pcr.index:2}  {lines[0]}")
    for line in lines[1:]:
        print(" " * 8 + line)
    logged = {True: "explained by the event log", False: "NOT what the event log gives", None: ""}[pcr.is_logged]
    words = ", ".join(filter(None, [_MARKS[pcr.is_expected], logged]))
    if words:
        print(" " * 8 + words)


def _print_event(event: Event) -> None:
    words = event.words if event.data_is_measured or not event.words else f"[{event.words}]"
    name = event.kind_name.removeprefix("EV_").removeprefix("EFI_")
    print(f"    {event.pcr:2}  {name:30} {words}"[:_COLUMNS].rstrip())


def _path(direct_path_only: bool) -> str:
    return "" if direct_path_only else "; its host can send it commands, too, and so measure what it likes (policy)"


def _uptime(clock_ms: int) -> str:
    return str(timedelta(seconds=clock_ms // 1000))


def _safe(safe: bool) -> str:
    return "" if safe else "; the clock may have been later before"


def _as_dict(attested: Attested) -> dict[str, object]:
    """As docs/formats/attestation-result.md has it."""
    evidence, quote = attested.evidence, attested.evidence.quote
    told: dict[str, object] = {
        "name": attested.owned.name,
        "verdict": attested.appraisal.verdict,
        "reasons": attested.appraisal.reasons,
        "attester": {
            "vm_id": str(attested.owned.vm_id),
            "vtpm_id": str(attested.endorsed.vtpm_id),
            "direct_path_only": attested.endorsed.direct_path_only,
            "chip": _chip(attested.endorsed.here),
        },
        "endorser": {"chip": _chip(attested.endorsed.endorser), "ek_certificate": attested.endorsed.ek.encode().hex()},
        "evidence": {
            "nonce": evidence.nonce.hex(),
            "ak_public": evidence.ak.public.hex(),
            "attested": evidence.attested.hex(),
            "signature": evidence.signature.hex(),
            "clock_ms": quote.clock_ms,
            "reset_count": quote.reset_count,
            "restart_count": quote.restart_count,
            "safe": quote.safe,
            "firmware": f"{quote.firmware:016x}",
        },
        "pcrs": {
            bank: {str(index): value.hex() for index, value in values.items()} for bank, values in evidence.pcrs.items()
        },
        "judged": [
            {"bank": pcr.bank, "index": pcr.index, "expected": pcr.is_expected, "logged": pcr.is_logged}
            for pcr in attested.appraisal.pcrs
        ],
    }
    told["event_log"] = None if attested.log is None else [_event(event) for event in attested.log.events]
    return told


def _chip(chip: Verified) -> dict[str, object]:
    from spvtpm.cli.terminal_parts import as_dict

    return as_dict(chip)


def _event(event: Event) -> dict[str, object]:
    return {
        "pcr": event.pcr,
        "type": event.kind_name,
        "digests": {bank: digest.hex() for bank, digest in event.digests.items()},
        "words": event.words,
        "data_is_measured": event.data_is_measured,
    }
