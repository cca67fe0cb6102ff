"""A walk of the handoff's model, replayed step by step with the rules that the code has."""

from __future__ import annotations

from dataclasses import dataclass, field

from spvtpm.processor.migration.handoff import DESTINATION, SOURCE, Event, Rule, State, rule_for

_TABLES = {"SOURCE": SOURCE, "DESTINATION": DESTINATION}
_FIRST = {"SOURCE": State.OFFERING, "DESTINATION": State.EXPECTING}


@dataclass
class _UnderWay:
    """A rule that a side is at, and the steps that are left of it, as the model says them."""

    handoff: str
    side: str
    rule: Rule
    left: list[tuple[str, str]]


@dataclass
class Replay:
    """What the model's lines come to under the code's rules.

    Attributes:
        taken: the rules that were followed to their end, by side.
    """

    taken: set[tuple[str, Rule]] = field(default_factory=set)

    def play(self, walk: str) -> None:
        """Raises `AssertionError` at the first step that the rules do not have."""
        self._states = dict[tuple[str, str], State]()
        self._at = dict[str, _UnderWay]()
        for line in walk.splitlines():
            verb, *words = line.split()
            match verb:
                case "offers":
                    self._states |= {(words[1], side): state for side, state in _FIRST.items()}
                case "begins":
                    self._begin(*words)
                case "does" | "stores" | "becomes":
                    self._step(words[0], (verb, words[1]))
                case "fails":
                    failed = self._at.pop(words[0])
                    assert failed.left[0] in _can_fail(failed.rule), line
                case "crashes":
                    self._crash(*words)

    def _begin(self, processor: str, handoff: str, side: str, state: str, event: str) -> None:
        rule = rule_for(_TABLES[side], State[state], Event[event])
        assert self._states[handoff, side] is rule.state
        assert processor not in self._at, "it is at another"
        self._at[processor] = _UnderWay(handoff, side, rule, _steps(rule))

    def _step(self, processor: str, step: tuple[str, str]) -> None:
        at = self._at[processor]
        assert at.left.pop(0) == step
        if step[0] != "does":
            self._states[at.handoff, at.side] = at.rule.to
        if not at.left:
            self.taken.add((at.side, at.rule))
            del self._at[processor]

    def _crash(self, processor: str, handoff: str, side: str, left: str) -> None:
        self._at.pop(processor, None)
        rule = rule_for(_TABLES[side], self._states[handoff, side], Event.CRASH)
        assert rule.to is State(int(left))
        self._states[handoff, side] = rule.to
        self.taken.add((side, rule))


def _steps(rule: Rule) -> list[tuple[str, str]]:
    new = ("stores" if rule.is_durable else "becomes", rule.to.name)
    return [*(("does", act.name) for act in rule.before), new, *(("does", act.name) for act in rule.then)]


def _can_fail(rule: Rule) -> list[tuple[str, str]]:
    steps = _steps(rule)[: len(rule.before) + 1]
    return steps if rule.is_durable else steps[:-1]
