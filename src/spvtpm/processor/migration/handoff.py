"""The handoff of a vTPM from one secure processor to another, as two tables of rules. Pure: `models/` checks them as they are.

    source                                              destination

    OFFERING ──stop──▶ STOPPED ──prepared──▶ GONE       EXPECTING ──state──▶ PREPARED ──commit──▶ LIVE
       │                  │                   │              │                  │
       └──cancel, link lost, a crash──▶       receipt        └─cancel, link     └──abort──▶ EMPTY
                       ABORTED                 ▼               lost, a crash
                                            FORGOTTEN          ──▶ EMPTY

Why there are never two, and never none for good:

- The destination runs the vTPM only once it has seen the *commit token*; the source shows that only after it has durably
  given the vTPM up. So never two.
- The source gives it up only once the destination has it durably, loaded and ready (`prepared`). So it is never lost.
- The destination throws a prepared vTPM away only when it sees the *abort token*; the source shows that only of a handoff that
  it will never commit. Each token is 32 random bytes of which the destination knows the SHA-256: anyone may carry it, any
  number of times, at any time, and nobody can make it. So a handoff that broke off anywhere is brought to its end by whoever
  asks the source and tells the destination, again and again.
- A source that crashes before it has committed never commits that handoff: it has forgotten it. `ABORTED` is not stored.
- Each durable step is a milestone (`rollback_guard.py`): a copy of the NV store from before it is worthless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from spvtpm.wire.errors import WrongState


class State(Enum):
    """Where one side of a handoff is."""

    OFFERING = auto()  # source: the vTPM runs here, and memory is under way
    STOPPED = auto()  # source: the vTPM is still, and its state may be under way
    GONE = auto()  # source, durable: the vTPM is the destination's
    FORGOTTEN = auto()  # source, durable: the destination has told that it has it
    ABORTED = auto()  # source: the vTPM stays
    EXPECTING = auto()  # destination: memory comes
    PREPARED = auto()  # destination, durable: all is here, and nothing runs
    LIVE = auto()  # destination, durable: the vTPM runs here
    EMPTY = auto()  # destination: nothing is here


class Event(Enum):
    """What happens to a side."""

    STOP = auto()  # the hypervisor wants the vTPM moved now
    CANCEL = auto()  # the hypervisor, or the VM's end, does away with the handoff
    LINK_LOST = auto()  # the connection to the other side has ended
    CRASH = auto()  # this side has lost all that was not durable
    STATE = auto()  # the other side's message: the vTPM, whole
    PREPARED = auto()  # the other side's message: it has the vTPM durably
    COMMIT = auto()  # the commit token has come, from whomever
    ABORT = auto()  # the abort token has come, from whomever
    RECEIPT = auto()  # the receipt token has come, from whomever
    ASK_COMMIT = auto()  # the hypervisor wants the commit token
    ASK_ABORT = auto()  # the hypervisor wants the abort token
    ASK_RECEIPT = auto()  # the hypervisor wants the receipt token


class Act(Enum):
    """What a side does."""

    STOP_VTPM = auto()  # it answers what is under way, then nothing more; its state is taken out
    RUN_VTPM = auto()  # the guest can use it here; after a crash there is no process that could, and this does nothing
    LOAD_VTPM = auto()  # a process has its whole state, and nobody can reach it
    DROP_VTPM = auto()  # that process and that state go, if they are there
    SEND_STATE = auto()  # to the other side, which has shown who it is
    SEND_PREPARED = auto()
    TELL_COMMIT = auto()  # to the other side if it is there, and to whoever asks
    TELL_ABORT = auto()
    TELL_RECEIPT = auto()  # to whoever asks


@dataclass(frozen=True, slots=True)
class Rule:
    """In a state, an event leads to a state.

    Attributes:
        state: in which it applies.
        event: what happens.
        to: the state afterwards.
        before: what is done first, in turn; if one of it fails, the side stays where it is.
        is_durable: whether the new state is made durable, after `before` and ahead of `then`.
        then: what is done in the new state, in turn.
    """

    state: State
    event: Event
    to: State
    before: tuple[Act, ...] = ()
    is_durable: bool = False
    then: tuple[Act, ...] = ()


SOURCE: Final[tuple[Rule, ...]] = (
    Rule(State.OFFERING, Event.STOP, State.STOPPED, before=(Act.STOP_VTPM,), then=(Act.SEND_STATE,)),
    Rule(State.OFFERING, Event.CANCEL, State.ABORTED, then=(Act.TELL_ABORT,)),
    Rule(State.OFFERING, Event.LINK_LOST, State.ABORTED),
    Rule(State.OFFERING, Event.CRASH, State.ABORTED),
    Rule(State.STOPPED, Event.PREPARED, State.GONE, is_durable=True, then=(Act.TELL_COMMIT, Act.DROP_VTPM)),
    Rule(State.STOPPED, Event.CANCEL, State.ABORTED, then=(Act.RUN_VTPM, Act.TELL_ABORT)),
    Rule(State.STOPPED, Event.LINK_LOST, State.ABORTED, then=(Act.RUN_VTPM,)),
    Rule(State.STOPPED, Event.CRASH, State.ABORTED),
    Rule(State.GONE, Event.ASK_COMMIT, State.GONE, then=(Act.TELL_COMMIT,)),
    Rule(State.GONE, Event.RECEIPT, State.FORGOTTEN, is_durable=True),
    Rule(State.GONE, Event.LINK_LOST, State.GONE),
    Rule(State.GONE, Event.CRASH, State.GONE),
    Rule(State.ABORTED, Event.ASK_ABORT, State.ABORTED, then=(Act.TELL_ABORT,)),
    Rule(State.ABORTED, Event.LINK_LOST, State.ABORTED),
    Rule(State.ABORTED, Event.CRASH, State.ABORTED),
    Rule(State.FORGOTTEN, Event.RECEIPT, State.FORGOTTEN),
    Rule(State.FORGOTTEN, Event.LINK_LOST, State.FORGOTTEN),
    Rule(State.FORGOTTEN, Event.CRASH, State.FORGOTTEN),
)
"""Of the side that has the vTPM. After a crash in `OFFERING` or `STOPPED` the vTPM is here, and its VM is off."""

DESTINATION: Final[tuple[Rule, ...]] = (
    Rule(
        State.EXPECTING,
        Event.STATE,
        State.PREPARED,
        before=(Act.LOAD_VTPM,),
        is_durable=True,
        then=(Act.SEND_PREPARED,),
    ),
    Rule(State.EXPECTING, Event.CANCEL, State.EMPTY, then=(Act.DROP_VTPM,)),
    Rule(State.EXPECTING, Event.ABORT, State.EMPTY, then=(Act.DROP_VTPM,)),
    Rule(State.EXPECTING, Event.LINK_LOST, State.EMPTY, then=(Act.DROP_VTPM,)),
    Rule(State.EXPECTING, Event.CRASH, State.EMPTY),
    Rule(State.PREPARED, Event.COMMIT, State.LIVE, is_durable=True, then=(Act.RUN_VTPM, Act.TELL_RECEIPT)),
    Rule(State.PREPARED, Event.ABORT, State.EMPTY, is_durable=True, then=(Act.DROP_VTPM,)),
    Rule(State.PREPARED, Event.LINK_LOST, State.PREPARED),
    Rule(State.PREPARED, Event.CRASH, State.PREPARED),
    Rule(State.LIVE, Event.COMMIT, State.LIVE, then=(Act.TELL_RECEIPT,)),
    Rule(State.LIVE, Event.ASK_RECEIPT, State.LIVE, then=(Act.TELL_RECEIPT,)),
    Rule(State.LIVE, Event.LINK_LOST, State.LIVE),
    Rule(State.LIVE, Event.CRASH, State.LIVE),
    Rule(State.EMPTY, Event.ABORT, State.EMPTY),
    Rule(State.EMPTY, Event.LINK_LOST, State.EMPTY),
    Rule(State.EMPTY, Event.CRASH, State.EMPTY),
)
"""Of the side that gets it. After a crash in `LIVE`, or in `PREPARED` and then `commit`, the vTPM is here, and its VM is off.
`EXPECTING` may have loaded a vTPM that could not be made durable."""


def rule_for(rules: Sequence[Rule], state: State, event: Event) -> Rule:
    """What an event leads to.

    Args:
        rules: of the side.
        state: of the side.
        event: what happens.

    Raises:
        WrongState: nothing of the kind may happen now; the side is as it was.
    """
    for rule in rules:
        if (rule.state, rule.event) == (state, event):
            return rule
    raise WrongState(f"migration: {event.name.lower()} makes no sense for a handoff that is {state.name.lower()}")
