"""What a fuzz target is: a function of bytes, what is known of good inputs, and how much of it a test can bear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
"""Saved inputs, a folder per target; what once was a finding is one."""


def _no_seeds() -> Sequence[bytes]:
    return ()


@dataclass(frozen=True, slots=True)
class Target:
    """One parser.

    Attributes:
        name: of the target, and of its folder in the corpus.
        about: one line for `--list`.
        run: takes any bytes; what it raises is a finding.
        seeds: makes good inputs to begin with.
        words: what often occurs in inputs, for a fuzzer's dictionary.
        examples: how many generated inputs the test runs.
        longest: bytes of the longest input worth trying.
    """

    name: str
    about: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]] = _no_seeds
    words: Sequence[bytes] = ()
    examples: int = 300
    longest: int = 4096

    def saved(self) -> list[Path]:
        """Its saved inputs."""
        return sorted(path for path in (CORPUS / self.name).glob("*") if path.is_file())
