"""Tables of the handoff with one mistake each: whoever checks the tables has to find every one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from spvtpm.processor.migration.handoff import DESTINATION, SOURCE, Act, Event, Rule, State

Rules = tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Mutant:
    """Tables with a mistake.

    Attributes:
        name: what the mistake is.
        violates: a property of `models/handoff.pml` that they violate.
        source: the rules of the source.
        destination: the rules of the destination.
    """

    name: str
    violates: str
    source: Rules = SOURCE
    destination: Rules = DESTINATION

    def __str__(self) -> str:
        return self.name


def changed(rules: Rules, state: State, event: Event, **changes: Any) -> Rules:
    return _each(rules, state, event, lambda rule: (replace(rule, **changes),))


def without(rules: Rules, state: State, event: Event) -> Rules:
    return _each(rules, state, event, lambda _rule: ())


def _each(rules: Rules, state: State, event: Event, change: Callable[[Rule], Rules]) -> Rules:
    assert any((rule.state, rule.event) == (state, event) for rule in rules)
    return tuple(
        new for rule in rules for new in (change(rule) if (rule.state, rule.event) == (state, event) else (rule,))
    )


def _source(name: str, violates: str, rules: Rules) -> Mutant:
    return Mutant(name, violates, source=rules)


def _destination(name: str, violates: str, rules: Rules) -> Mutant:
    return Mutant(name, violates, destination=rules)


MUTANTS = (
    _source(
        "the-commit-token-is-told-before-the-vtpm-is-given-up",
        "never_two_owners",
        changed(SOURCE, State.STOPPED, Event.PREPARED, before=(Act.TELL_COMMIT,), then=(Act.DROP_VTPM,)),
    ),
    _source(
        "giving-up-is-not-durable", "never_two_owners", changed(SOURCE, State.STOPPED, Event.PREPARED, is_durable=False)
    ),
    _source("the-vtpm-is-not-stopped", "never_two", changed(SOURCE, State.OFFERING, Event.STOP, before=())),
    _source(
        "given-up-when-the-link-is-lost",
        "given_up_only_once_the_other_has_it",
        changed(SOURCE, State.STOPPED, Event.LINK_LOST, to=State.GONE, is_durable=True, then=(Act.DROP_VTPM,)),
    ),
    _source(
        "cancelled-after-it-was-given-up",
        "never_both_tokens",
        (*SOURCE, Rule(State.GONE, Event.CANCEL, State.ABORTED, then=(Act.RUN_VTPM, Act.TELL_ABORT))),
    ),
    _source(
        "the-abort-token-is-told-of-what-was-given-up",
        "never_thrown_away_when_given_up",
        (*SOURCE, Rule(State.GONE, Event.ASK_ABORT, State.GONE, then=(Act.TELL_ABORT,))),
    ),
    _source(
        "the-abort-token-is-told-while-it-may-still-commit",
        "never_both_tokens",
        (*SOURCE, Rule(State.STOPPED, Event.ASK_ABORT, State.STOPPED, then=(Act.TELL_ABORT,))),
    ),
    _source(
        "a-source-that-gave-up-tells-the-commit-token-once",
        "ends_with_exactly_one",
        without(SOURCE, State.GONE, Event.ASK_COMMIT),
    ),
    _source(
        "a-source-that-aborted-tells-the-abort-token-once",
        "ends_with_exactly_one",
        without(SOURCE, State.ABORTED, Event.ASK_ABORT),
    ),
    _destination(
        "prepared-is-not-durable",
        "never_thrown_away_when_given_up",
        changed(DESTINATION, State.EXPECTING, Event.STATE, is_durable=False),
    ),
    _destination(
        "prepared-is-sent-before-it-is-durable",
        "given_up_only_once_the_other_has_it",
        changed(DESTINATION, State.EXPECTING, Event.STATE, before=(Act.LOAD_VTPM, Act.SEND_PREPARED), then=()),
    ),
    _destination(
        "a-prepared-vtpm-goes-when-the-link-is-lost",
        "never_thrown_away_when_given_up",
        changed(DESTINATION, State.PREPARED, Event.LINK_LOST, to=State.EMPTY, is_durable=True, then=(Act.DROP_VTPM,)),
    ),
    _destination(
        "a-prepared-vtpm-runs-when-the-link-is-lost",
        "never_two_owners",
        changed(DESTINATION, State.PREPARED, Event.LINK_LOST, to=State.LIVE, is_durable=True, then=(Act.RUN_VTPM,)),
    ),
    _destination(
        "being-live-is-not-durable",
        "crashes_lead_where_the_rules_say",
        changed(DESTINATION, State.PREPARED, Event.COMMIT, is_durable=False),
    ),
    _destination(
        "the-receipt-is-told-before-the-vtpm-is-taken",
        "ends_with_exactly_one",
        (*DESTINATION, Rule(State.PREPARED, Event.ASK_RECEIPT, State.PREPARED, then=(Act.TELL_RECEIPT,))),
    ),
    _destination(
        "the-receipt-is-told-once",
        "ends_with_exactly_one",
        without(without(DESTINATION, State.LIVE, Event.ASK_RECEIPT), State.LIVE, Event.COMMIT),
    ),
    _destination(
        "what-was-loaded-and-not-stored-stays-in-memory",
        "ends_with_exactly_one",
        changed(DESTINATION, State.EXPECTING, Event.LINK_LOST, then=()),
    ),
)
