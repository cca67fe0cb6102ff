"""The handoff's tables under any schedule: at every moment at most one vTPM, and one in the end, with nothing left over."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from spvtpm.processor.migration.handoff import DESTINATION, SOURCE, Event, Rule
from tests.processor.handoff_mutants import MUTANTS, Mutant
from tests.processor.handoff_world import Move, Role, World

pytestmark = [
    pytest.mark.claim("B9"),
    pytest.mark.claim("C8"),
    pytest.mark.attack("A16"),
    pytest.mark.attack("A18"),
    pytest.mark.attack("A19"),
]

GROUPS, SEEDS_OF_A_GROUP, MOST_MOVES = 10, 300, 150
SEEDS_FOR_A_MUTANT = 2000

RULES = [(role, rule) for role, rules in ((Role.SOURCE, SOURCE), (Role.DESTINATION, DESTINATION)) for rule in rules]


def weight(move: Move) -> int:
    """Misfortune is rarer than progress, or nothing would get far enough to go wrong."""
    if move.is_fault or "CANCEL" in move.name:
        return 1
    return 2 if "refused" in move.name or "writes" in move.name else 12


def play(world: World, seed: int) -> set[tuple[Role, Rule]]:
    """A random schedule and its end.

    Returns:
        The rules that were begun on the way.
    """
    chance = random.Random(seed)  # noqa: S311  # to be repeatable is what it is for
    begun = set()
    try:
        for _ in range(chance.randrange(MOST_MOVES)):
            moves = list(world.moves())
            move = chance.choices(moves, [weight(move) for move in moves])[0]
            if move.rule is not None:
                begun.add(move.rule)
            world.make(move)
        world.come_to_an_end()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(world.history)) from error
    return begun


@pytest.mark.parametrize("group", range(GROUPS))
def test_at_every_moment_of_any_schedule_at_most_one_and_in_the_end_exactly_one(group: int) -> None:
    for seed in range(group * SEEDS_OF_A_GROUP, (group + 1) * SEEDS_OF_A_GROUP):
        play(World(), seed)


def test_the_schedules_take_every_rule() -> None:
    begun = set[tuple[Role, Rule]]()
    for seed in range(4 * SEEDS_OF_A_GROUP):
        begun |= play(World(), seed)
    assert begun == {(role, rule) for role, rule in RULES if rule.event is not Event.CRASH}


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_schedule_finds_that(mutant: Mutant) -> None:
    with pytest.raises(AssertionError, match="seed"):
        for seed in range(SEEDS_FOR_A_MUTANT):
            play(World(mutant.source, mutant.destination), seed)


class AnySchedule(RuleBasedStateMachine):
    """Hypothesis looks for schedules that go wrong, and makes them short."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(data=st.data())
    def something_happens(self, data: st.DataObject) -> None:
        moves = list(self.world.moves())
        self.world.make(moves[data.draw(st.integers(0, len(moves) - 1))])

    def teardown(self) -> None:
        self.world.come_to_an_end()


AnySchedule.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestAnySchedule = AnySchedule.TestCase


# Each rule × each fault, at each step of it

Fault = Callable[[World], None]


def crash_of(role: Role) -> Fault:
    return lambda world: world.crash(0 if role is Role.SOURCE else 1)


def link_lost(world: World) -> None:
    world.cut(world.handoffs[0])


def tokens_lost(world: World) -> None:
    world.carried.clear()


def tokens_brought(world: World, order: Callable[[Sequence[str]], Sequence[str]]) -> None:
    """To everyone to whom they mean something."""
    for name in order([f"{name} {index}" for index, name in world.carried]):
        for move in [move for move in world.moves() if move.name.removesuffix(", refused").endswith(name)]:
            world.make(move)
            world.finish()


def tokens_duplicated(world: World) -> None:
    tokens_brought(world, lambda names: [*names, *names])


def tokens_reordered(world: World) -> None:
    tokens_brought(world, lambda names: names[::-1])


FAULTS: dict[str, Fault] = {
    "source-crashes": crash_of(Role.SOURCE),
    "destination-crashes": crash_of(Role.DESTINATION),
    "link-is-lost": link_lost,
    "tokens-are-lost": tokens_lost,
    "tokens-come-twice": tokens_duplicated,
    "tokens-come-in-another-order": tokens_reordered,
}


def named(world: World, name: str) -> Move:
    return next(move for move in world.moves() if move.name == name)


@cache
def ways() -> dict[tuple[Role, Rule], tuple[World, str]]:
    """For each rule, a world in which it can be taken up, after as few moves as can be, and the name of that move."""
    found = dict[tuple[Role, Rule], tuple[World, str]]()
    seen, open_worlds = set[str](), deque([World()])
    while open_worlds and len(found) < len(RULES):
        world = open_worlds.popleft()
        for handoff in world.handoffs:
            for role, crashing in RULES:
                number = handoff.source if role is Role.SOURCE else 1 - handoff.source
                is_there = world.processors[number].states[handoff.number, role] is crashing.state
                if is_there and crashing.event is Event.CRASH:
                    found.setdefault((role, crashing), (world, f"crash of {number}"))
        for move in world.moves():
            if move.rule is not None:
                found.setdefault(move.rule, (world, move.name))
            if move.name.startswith(("crash", "guest")) or ("offers" in move.name and world.handoffs):
                continue
            after = copy.deepcopy(world)
            after.make(named(after, move.name))
            after.finish()
            state = repr((after.processors, after.handoffs, after.carried))
            if state not in seen:
                seen.add(state)
                open_worlds.append(after)
    return found


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("role", "rule"), RULES, ids=[f"{role.name.lower()}-{rule.state.name}-{rule.event.name}" for role, rule in RULES]
)
def test_a_fault_at_any_step_of_a_rule_leaves_one(role: Role, rule: Rule, fault: str) -> None:
    before, name = ways()[role, rule]
    steps = len(rule.before) + 1 + len(rule.then)
    for done in range(-1, steps + 1):  # before the event, after it, and after each step
        world = copy.deepcopy(before)
        if done >= 0:
            world.make(named(world, name))
        number = next((number for number, processor in enumerate(world.processors) if processor.at is not None), None)
        for _ in range(done if number is not None else 0):
            world.go_on(number)  # type: ignore[arg-type]  # mypy does not see that it is a number then
            world.look()
        FAULTS[fault](world)
        world.look()
        world.finish()
        world.come_to_an_end()
