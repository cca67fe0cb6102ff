"""Damaged state blobs, and what libtpms makes of them when nobody authenticates them first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum

from spvtpm.engine.errors import DamagedState, EngineError
from spvtpm.engine.libtpms import Engine
from tests import tpm_commands as tpm
from tests.throwaway import ChildDied, run_in_child


class Verdict(Enum):
    """What libtpms did with a blob."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    FAILED = "accepted, then failed"
    CRASHED = "crashed or hung"


def flip_bit(blob: bytes, bit: int) -> bytes:
    """The blob with one bit (counted from the first byte's lowest) inverted."""
    changed = bytearray(blob)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def sampled_bits(blob: bytes, count: int) -> list[int]:
    """About `count` bit numbers, spread evenly over the blob and over the bits of a byte."""
    step = max(1, len(blob) * 8 // count)
    return list(range(0, len(blob) * 8, step | 1))


def bare_verdict(permanent: bytes) -> Verdict:
    """Resumes a permanent state that nobody authenticated, boots and reads, in a process of its own."""

    def boot() -> Verdict:
        with Engine(lambda _permanent: None) as engine:
            try:
                engine.resume(permanent)
            except DamagedState:
                return Verdict.REFUSED
            except EngineError:
                return Verdict.FAILED
            responses = [engine.process(command) for command in (tpm.startup(), tpm.get_random(8), tpm.read_clock())]
        return Verdict.FAILED if any(tpm.response_code(response) for response in responses) else Verdict.ACCEPTED

    try:
        return run_in_child(boot, timeout_s=10)
    except ChildDied:
        return Verdict.CRASHED


def bare_verdicts(permanent: bytes, bits: Iterable[int]) -> Counter[Verdict]:
    """How often bare libtpms did what, for one single-bit flip after the other."""
    return Counter(bare_verdict(flip_bit(permanent, bit)) for bit in bits)
