"""The model of the handoff holds, is of the code's own rules, and finds what is wrong with others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from models.check import LIVENESS, SAFETY, WORLDS, Checker, World
from models.rules_as_promela import WRITTEN, rules_as_promela

from spvtpm.processor.migration.handoff import DESTINATION, SOURCE
from tests.models.handoff_walk import Replay
from tests.processor.handoff_mutants import MUTANTS, Mutant

pytestmark = [
    pytest.mark.claim("B9"),
    pytest.mark.attack("A18"),
    pytest.mark.attack("A19"),
    pytest.mark.skipif(shutil.which("spin") is None, reason="spin is not installed"),
]

SMALL = World(handoffs=2, crashes=1, failures=1)
WALKED = World(handoffs=3, crashes=9, failures=2)
WALKS, STEPS = 600, 2500

CheckerOf = Callable[[World], Checker]


@pytest.fixture(scope="module")
def checker_of(tmp_path_factory: pytest.TempPathFactory) -> CheckerOf:
    """Of a world, with the code's rules."""
    made = dict[World, Checker]()

    def checker(world: World) -> Checker:
        if world not in made:
            made[world] = Checker(tmp_path_factory.mktemp("model"), world)
        return made[world]

    return checker


def test_the_models_rules_are_those_of_the_code() -> None:
    assert WRITTEN.read_text() == rules_as_promela(), "python -m models --write"


@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("name", SAFETY + LIVENESS)
def test_the_handoff_keeps(name: str, world: World, checker_of: CheckerOf) -> None:
    finding = checker_of(world).check(name)
    assert finding.holds, finding.trace
    assert finding.states > 10_000, "that was no world"


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_model_finds_that(mutant: Mutant, tmp_path: Path) -> None:
    finding = Checker(tmp_path, SMALL, mutant.source, mutant.destination, is_long=False).check(mutant.violates)
    assert not finding.holds
    assert "offers" in finding.trace


@pytest.mark.parametrize(
    ("condition", "violated"),
    [
        pytest.param("OFFERS_TO_ANYONE", "no_state_to_strangers", id="the-other-side-shows-who-it-is"),
        pytest.param("TOKENS_ARE_NOT_CHECKED", "never_two", id="a-token-is-checked-against-its-hash"),
        pytest.param("OTHERS_PICK_IDS", "never_thrown_away_when_given_up", id="the-source-picks-the-id-itself"),
        pytest.param("FAILED_STORES_MAY_LAST", "never_both_tokens", id="a-store-that-fails-has-done-nothing"),
    ],
)
def test_the_handoff_rests_on_it_that(condition: str, violated: str, tmp_path: Path) -> None:
    assert not Checker(tmp_path, replace(SMALL, without=(condition,)), is_long=False).check(violated).holds


def test_the_model_takes_every_rule_of_the_code_and_no_other(checker_of: CheckerOf) -> None:
    replay = Replay()
    for seed in range(WALKS):
        replay.play(checker_of(WALKED).walk(seed, STEPS))
    rules = {("SOURCE", rule) for rule in SOURCE} | {("DESTINATION", rule) for rule in DESTINATION}
    assert replay.taken == rules
