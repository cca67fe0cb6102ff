"""Has spin walk through every state of the handoff, and says what it found."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from models.rules_as_promela import rules_as_promela
from spvtpm.processor.migration.handoff import DESTINATION, SOURCE, Rule

SAFETY: Final = (
    "never_two",
    "never_two_owners",
    "no_state_to_strangers",
    "given_up_only_once_the_other_has_it",
    "never_thrown_away_when_given_up",
    "never_both_tokens",
    "crashes_lead_where_the_rules_say",
)
LIVENESS: Final = ("ends_with_exactly_one",)

_MODEL: Final = Path(__file__).parent / "handoff.pml"
_NO_CALM: Final = "NEVER_CALM"
_DEEPEST: Final = 100_000
"""Steps of one run; `pan` says so if that is not enough."""


@dataclass(frozen=True, slots=True)
class World:
    """How much may happen.

    Attributes:
        handoffs: one after the other, forth or back.
        crashes: of each side.
        failures: steps that fail, of both sides together.
        without: what the rules rest on and this world has not; `handoff.pml` lists it.
    """

    handoffs: int
    crashes: int
    failures: int
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.handoffs} handoffs, {self.crashes} crashes of each side, {self.failures} failures"

    @property
    def defines(self) -> tuple[str, ...]:
        numbers = (f"HANDOFFS={self.handoffs}", f"CRASHES={self.crashes}", f"FAILURES={self.failures}")
        return tuple(f"-D{define}" for define in numbers + self.without)


WORLDS: Final = (World(handoffs=2, crashes=2, failures=1), World(handoffs=3, crashes=1, failures=0))


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one property.

    Attributes:
        holds: in every state, on every way.
        states: how many there were; those until the first violation, if there was one.
        seconds: it took, without compiling.
        trace: what happened up to the violation, a step a line, if there was one.
    """

    holds: bool
    states: int
    seconds: float
    trace: str


class Checker:
    """One model, compiled once for safety and once for liveness.

    Args:
        directory: to work in; empty.
        world: how much may happen.
        source: the rules of the source.
        destination: the rules of the destination.
        is_long: a search of many seconds, for which an optimised checker is worth its compilation.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        source: Sequence[Rule] = SOURCE,
        destination: Sequence[Rule] = DESTINATION,
        *,
        is_long: bool = True,
    ) -> None:
        self._optimisation = "-O2" if is_long else "-O0"
        self._directory = directory
        self._world = world
        self._compiled = dict[bool, Path]()
        shutil.copy(_MODEL, directory)
        (directory / "handoff_rules.pml").write_text(rules_as_promela(source, destination))

    def check(self, name: str) -> Finding:
        """Of one of `SAFETY` or `LIVENESS`.

        Raises:
            CalledProcessError: spin or the compiler failed.
            ValueError: the search was not through.
        """
        directory = self._compile(ends=name in LIVENESS)
        begin = time.monotonic()
        said = _run(directory, "./pan", "-a", f"-m{_DEEPEST}", "-N", name)
        seconds = time.monotonic() - begin
        states, errors = re.search(r"(\d+) states, stored", said), re.search(r"errors: (\d+)", said)
        if states is None or errors is None or "max search depth too small" in said:
            raise ValueError(f"the search was not through:\n{said}")
        trace = (
            "" if errors[1] == "0" else _steps(_run(directory, "spin", "-t", "-T", *self._defines(name), _MODEL.name))
        )
        return Finding(errors[1] == "0", int(states[1]), seconds, trace)

    def walk(self, seed: int, steps: int) -> str:
        """A walk at random: what happened, a step a line."""
        defines = (*self._world.defines, f"-D{_NO_CALM}", "-DWALKS")
        return _steps(_run(self._directory, "spin", f"-n{seed}", f"-u{steps}", "-T", *defines, _MODEL.name))

    def _defines(self, name: str) -> tuple[str, ...]:
        return self._world.defines + (() if name in LIVENESS else (f"-D{_NO_CALM}",))

    def _compile(self, *, ends: bool) -> Path:
        if ends not in self._compiled:
            directory = self._directory / ("liveness" if ends else "safety")
            directory.mkdir()
            for file in self._directory.glob("*.pml"):
                shutil.copy(file, directory)
            _run(directory, "spin", *self._defines(LIVENESS[0] if ends else SAFETY[0]), "-a", _MODEL.name)
            _run(directory, "gcc", "-w", self._optimisation, "-DCOLLAPSE", "-o", "pan", "pan.c")
            self._compiled[ends] = directory
        return self._compiled[ends]


def _run(directory: Path, *command: str) -> str:
    return subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, text=True, check=True).stdout


def _steps(said: str) -> str:
    """The lines that the model itself says."""
    ours = re.findall(r"(?m)^ *((?:offers|begins|does|stores|becomes|fails|crashes|boots|breaks|calm)\b.*)$", said)
    return "\n".join(ours)
