"""The two tables of the handoff, written as Promela: what each rule does, step by step, with room for a crash between any two.

`models/handoff.pml` includes the result, and says what each word of it means: `COMES_…` (can this event come now), `DOES_…` (an
act), `STORES` and `BECOMES` (the new state, durable or not).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spvtpm.processor.migration.handoff import DESTINATION, SOURCE, Act, Event, Rule, State

WRITTEN: Final = Path(__file__).parent / "handoff_rules.pml"

_HEAD = """\
/* The rules of src/spvtpm/processor/migration/handoff.py, written by `python -m models --write`: change them there. */
"""
_HAPPEN_ONCE: Final = (Event.STATE, Event.PREPARED, Event.LINK_LOST)
_IN_MEMORY: Final = (Act.STOP_VTPM, Act.RUN_VTPM, Act.LOAD_VTPM, Act.DROP_VTPM)
_MAY_FAIL: Final = "failures > 0 && !calm"
_TELLS: Final = (Act.TELL_COMMIT, Act.TELL_ABORT, Act.TELL_RECEIPT)


@dataclass(frozen=True, slots=True)
class _Side:
    """What the model calls a side.

    Attributes:
        name: `SOURCE` or `DESTINATION`.
        forgets_to: where a handoff is that this side knows nothing of.
        first: the number of its first rule.
    """

    name: str
    forgets_to: State
    first: int


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a rule.

    Attributes:
        text: in Promela.
        failure: in Promela; the rule ends before the step. Empty if it cannot fail.
        lasts: it changes more than this side's memory.
    """

    text: str
    failure: str
    lasts: bool


def rules_as_promela(source: Sequence[Rule] = SOURCE, destination: Sequence[Rule] = DESTINATION) -> str:
    """What `handoff.pml` includes."""
    blocks = [_HEAD, "".join(f"#define {state.name} {state.value}\n" for state in State)]
    sides = (_Side("SOURCE", State.ABORTED, 1), _Side("DESTINATION", State.EMPTY, 1 + len(source)))
    for side, rules in zip(sides, (source, destination), strict=True):
        begins, goes_on = _options(side, rules)
        blocks += [
            _macro(f"{side.name}_BEGINS(K)", begins),
            _macro(f"{side.name}_GOES_ON", goes_on),
            _crash(side, rules),
        ]
    return "\n".join(blocks)


def _options(side: _Side, rules: Sequence[Rule]) -> tuple[list[str], list[str]]:
    """Of a side that takes up an event of handoff K with all it does at once, and of one that goes on with a rule."""
    begins, goes_on = list[str](), list[str]()
    for number, rule in enumerate(rules, side.first):
        if rule.event is Event.CRASH:  # no event that a side takes up: it happens to it
            continue
        takes = (
            f"rule[me] == 0 && IS_{side.name}(K) && {side.name.lower()}[K] == {rule.state.name}"
            f" && COMES_{side.name}_{rule.event.name}(K) && {_is_news(rule)} -> handoff[me] = K;{_uses_up(side, rule.event)}"
            f' printf("begins %d %d {side.name} {rule.state.name} {rule.event.name}\\n", me, K); '
        )
        parts = list(_parts(side, rule))
        for at, part in enumerate(parts):
            options = goes_on if at else begins
            begin = f"rule[me] == {number} && step[me] == {at} -> " if at else takes
            is_last = at == len(parts) - 1
            end = "ENDS" if is_last else f"rule[me] = {number}; step[me] = {at + 1}"
            done = ""
            for step in part:
                if step.failure:
                    options.append(f"{_MAY_FAIL} && {begin}{done}{step.failure}; ENDS")
                done += f"{step.text}; "
            options.append(f"{begin}{done}{end}")
    return begins, goes_on


def _uses_up(side: _Side, event: Event) -> str:
    return f" USES_{side.name}_{event.name}(K);" if event in _HAPPEN_ONCE else ""


def _is_news(rule: Rule) -> str:
    """Whether a rule that leaves a side where it is changes anything; in the end, the model takes no others."""
    if rule.to is not rule.state or rule.event is Event.LINK_LOST or set(rule.then) - set(_TELLS):
        return "true"
    told = "".join(f" || !{act.name.removeprefix('TELL_').lower()}_carried[K]" for act in rule.then)
    return f"(!calm{told})"


def _parts(side: _Side, rule: Rule) -> Iterator[list[_Step]]:
    """The steps in turn, parted where a crash makes a difference: after each that leaves something behind outside of this
    side's memory."""
    part = list[_Step]()
    for step in _steps(side, rule):
        part.append(step)
        if step.lasts:
            yield part
            part = []
    if part:
        yield part


def _steps(side: _Side, rule: Rule) -> Iterator[_Step]:
    for act in rule.before:
        yield _does(side, act, failure="FAILS(handoff[me])")
    verb = "stores" if rule.is_durable else "becomes"
    yield _Step(
        f"{side.name}_{verb.upper()}(handoff[me], {rule.to.name}); {_says(verb, rule.to.name)}",
        failure=f"{side.name}_FAILS_TO_STORE(handoff[me], {rule.to.name})" if rule.is_durable else "",
        lasts=rule.is_durable,
    )
    for act in rule.then:
        yield _does(side, act, failure="")


def _does(side: _Side, act: Act, *, failure: str) -> _Step:
    text = f"{side.name}_DOES_{act.name}(handoff[me]); {_says('does', act.name)}"
    return _Step(text, failure, lasts=act not in _IN_MEMORY)


def _says(verb: str, word: str) -> str:
    return f'printf("{verb} %d {word}\\n", me)'


def _crash(side: _Side, rules: Sequence[Rule]) -> str:
    """What the rules say of a crash, which the model compares with what is left in durable memory."""
    after = f"{side.forgets_to.name}"
    for rule in rules:
        if rule.event is Event.CRASH:
            after = f"((state) == {rule.state.name} -> {rule.to.name} : {after})"
    return f"#define {side.name}_FORGETS_TO {side.forgets_to.name}\n#define {side.name}_AFTER_CRASH(state) \\\n    {after}\n"


def _macro(head: str, options: Sequence[str]) -> str:
    lines = [f"#define {head}", *(f"    :: atomic {{ {option} }}" for option in options)]
    return " \\\n".join(lines) + "\n"
