"""What the owner thinks of a VM's evidence: which PCRs he expects, and whether the firmware's log explains them. Pure.

In the words of RFC 9334: `Expected` holds the reference values, `Appraisal` the attestation result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from spvtpm.wire.decoding import UNDECODABLE, in_words
from spvtpm.wire.errors import UsageError
from spvtpm.wire.event_log import EventLog
from spvtpm.wire.tpm_structures import BANKS, DIGEST_BYTES, PCRS, PcrSelection, PcrValues

MAX_POLICY_BYTES: Final = 1 << 20

_Digest = Annotated[str, Meta(pattern=r"\A([0-9A-Fa-f]{2}){20,64}\Z")]
_Index = Annotated[str, Meta(pattern=r"\A([0-9]|1[0-9]|2[0-3])\Z")]

Expected = dict[str, dict[int, frozenset[bytes]]]
"""For each bank, by name and index, the values that will do."""

DEFAULT_PCRS: Final = "sha256:" + ",".join(map(str, range(16)))
"""Those that nobody can reset but a new boot."""


class _PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pcrs: Annotated[
        dict[
            Literal["sha1", "sha256", "sha384", "sha512"],
            Annotated[dict[_Index, _Digest | Annotated[list[_Digest], Meta(min_length=1)]], Meta(min_length=1)],
        ],
        Meta(min_length=1),
    ]


@dataclass(frozen=True, slots=True)
class JudgedPcr:
    """One PCR.

    Attributes:
        bank: its bank's name.
        index: its number.
        value: as quoted.
        is_expected: whether it is as the owner expects; None: he expects nothing of it.
        is_logged: whether the event log explains it; None: no event went into it, or there is no log.
    """

    bank: str
    index: int
    value: bytes
    is_expected: bool | None
    is_logged: bool | None


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What came of it.

    Attributes:
        verdict: `trusted`: all is as expected; `genuine`: nothing was expected, and the evidence is the vTPM's; `refused`.
        reasons: why it was refused.
        pcrs: all that were quoted.
    """

    verdict: Literal["trusted", "genuine", "refused"]
    reasons: list[str]
    pcrs: list[JudgedPcr]


def appraise(pcrs: PcrValues, expected: Expected | None, log: EventLog | None) -> Appraisal:
    """Judges PCRs that were verified as quoted.

    Args:
        pcrs: the values.
        expected: what the owner expects, all of it among the values; None: nothing.
        log: the firmware's; None: there is none.
    """
    replayed = {} if log is None else log.replay()
    judged = [
        JudgedPcr(
            bank,
            index,
            value,
            _among(value, expected or {}, bank, index),
            None if (logged := replayed.get(bank, {}).get(index)) is None else logged == value,
        )
        for bank, values in pcrs.items()
        for index, value in values.items()
    ]
    reasons = [f"PCR {pcr.index} of {pcr.bank} is not as expected" for pcr in judged if pcr.is_expected is False]
    reasons += [
        f"PCR {pcr.index} of {pcr.bank} is not what the event log gives" for pcr in judged if pcr.is_logged is False
    ]
    if log is not None and not any(pcr.is_logged for pcr in judged):
        reasons.append("the event log explains none of these PCRs")
    return Appraisal("refused" if reasons else "genuine" if expected is None else "trusted", reasons, judged)


def parse_policy(data: bytes) -> Expected:
    """The owner's policy file.

    Raises:
        UsageError: it is none.
    """
    try:
        file = msgspec.json.decode(data, type=_PolicyFile)
    except UNDECODABLE as error:
        raise UsageError(f"the policy is not what it should be: {in_words(error)}") from None
    expected: Expected = {
        bank: {int(index): _values(allowed) for index, allowed in of_bank.items()}
        for bank, of_bank in file.pcrs.items()
    }
    for bank, of_bank in expected.items():
        if any(len(value) != DIGEST_BYTES[bank] for values in of_bank.values() for value in values):
            raise UsageError(f"the policy has a value of {bank} that is not {DIGEST_BYTES[bank]} bytes long")
    return expected


def parse_selection(text: str) -> PcrSelection:
    """PCRs as tpm2-tools name them, such as `sha256:0,1,2,7+sha1:0`.

    Raises:
        UsageError: they are none.
    """
    wanted: dict[str, set[int]] = {}
    for part in text.split("+"):
        bank, _, listed = part.partition(":")
        indices = listed.split(",")
        if bank not in BANKS or not all(
            index.isascii() and index.isdecimal() and int(index) < PCRS for index in indices
        ):
            raise UsageError(f"no such PCRs: {text}; say them as sha256:0,1,2,7")
        wanted.setdefault(bank, set()).update(map(int, indices))
    return _selection(wanted)


def selection_of(pcrs: str | None, expected: Expected | None) -> PcrSelection:
    """What is quoted: the PCRs that were named and those of which something is expected; of neither, the default.

    Raises:
        UsageError: what was named is no PCRs.
    """
    wanted: dict[str, set[int]] = {bank: set(of_bank) for bank, of_bank in (expected or {}).items()}
    if pcrs is not None or expected is None:
        for bank, indices in parse_selection(DEFAULT_PCRS if pcrs is None else pcrs).banks:
            wanted.setdefault(bank, set()).update(indices)
    return _selection(wanted)


def _selection(wanted: Mapping[str, set[int]]) -> PcrSelection:
    return PcrSelection(tuple((bank, tuple(sorted(wanted[bank]))) for bank in BANKS if bank in wanted))


def _values(allowed: str | list[str]) -> frozenset[bytes]:
    return frozenset(map(bytes.fromhex, [allowed] if isinstance(allowed, str) else allowed))


def _among(value: bytes, expected: Expected, bank: str, index: int) -> bool | None:
    allowed = expected.get(bank, {}).get(index)
    return None if allowed is None else value in allowed
