"""Inputs without coverage: Hypothesis changes good inputs, or makes them up, and shrinks what it finds."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from fuzz.target import Target

Edit = tuple[str, int, bytes]


@dataclass(frozen=True, slots=True)
class Finding:
    """An input under which a target raised.

    Attributes:
        data: the smallest one found.
        error: what it raised.
    """

    data: bytes
    error: BaseException


def _edited(content: bytes, edit: Edit) -> bytes:
    kind, place, piece = edit
    at = place % (len(content) + 1)
    if kind == "overwrite":
        return content[:at] + piece + content[at + len(piece) :]
    if kind == "insert":
        return content[:at] + piece + content[at:]
    if kind == "delete":
        return content[:at] + content[at + len(piece) :]
    if kind == "flip" and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << place % 8]) + content[at + 1 :]
    return content[:at] if kind == "cut" else content + content[at:]


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Any bytes, and good inputs with up to four changes."""
    good = [*target.seeds(), *(path.read_bytes() for path in target.saved())]
    longest = min(target.longest, 400)
    any_bytes = st.one_of(st.binary(max_size=longest), st.binary(min_size=longest // 2, max_size=longest))
    if not good:
        return any_bytes
    piece = st.one_of(st.binary(max_size=8), st.sampled_from(target.words)) if target.words else st.binary(max_size=8)
    edit = st.tuples(
        st.sampled_from(("overwrite", "insert", "delete", "flip", "cut", "repeat")), st.integers(0, 8191), piece
    )
    changed = st.builds(
        lambda content, edits: reduce(_edited, edits, content), st.sampled_from(good), st.lists(edit, max_size=4)
    )
    return st.one_of(changed, changed, any_bytes, st.builds(operator.add, changed, any_bytes))


def explore(target: Target, *, examples: int, seed_number: int) -> Finding | None:
    """Runs the target on that many generated inputs; the same ones for the same seed."""
    last = b""

    @seed(seed_number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @given(inputs(target))
    def attempt(data: bytes) -> None:
        nonlocal last
        last = data
        target.run(data)

    try:
        attempt()
    except Exception as error:  # whatever a target raises
        return Finding(last, error)
    return None
