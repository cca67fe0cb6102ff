"""Two secure processors, interpreted from the handoff's tables act by act, in a world that does its worst. No time, no I/O.

Whatever may happen next is a `Move` with a name; a test plays them in any order, and the world looks after each whether
anything is wrong. `come_to_an_end` ends all faults and has carriers try again until nothing changes any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Final

from spvtpm.processor.migration.handoff import DESTINATION, SOURCE, Act, Event, Rule, State, rule_for
from spvtpm.wire.errors import WrongState

MOST_HANDOFFS: Final = 5
_MOST_ROUNDS: Final = 60
"""More than any end takes."""


class Role(Enum):
    SOURCE = auto()
    DESTINATION = auto()


Key = tuple[int, Role]
"""A handoff, and which side of it."""

_TOKENS = {Act.TELL_COMMIT: "commit", Act.TELL_ABORT: "abort", Act.TELL_RECEIPT: "receipt"}
_HEARD_BY = {"commit": Role.DESTINATION, "abort": Role.DESTINATION, "receipt": Role.SOURCE}
_MESSAGES = {Act.SEND_STATE: Event.STATE, Act.SEND_PREPARED: Event.PREPARED}
_ORDERS = {
    Role.SOURCE: (Event.STOP, Event.CANCEL, Event.ASK_COMMIT, Event.ASK_ABORT),
    Role.DESTINATION: (Event.CANCEL, Event.ASK_RECEIPT),
}


@dataclass
class Handoff:
    """What belongs to one.

    Attributes:
        source: which processor.
        is_cut: the link brings nothing more than what is in it.
        ends: who has not seen yet that it is over.
        messages: in the link, to each side: what, and what the vTPM's content was; or a token.
        told: names of its tokens that were ever told.
    """

    number: int
    source: int
    is_cut: bool = False
    ends: set[Role] = field(default_factory=lambda: {Role.SOURCE, Role.DESTINATION})
    messages: dict[Role, list[tuple[Event, int] | bytes]] = field(
        default_factory=lambda: {Role.SOURCE: [], Role.DESTINATION: []}
    )
    told: set[str] = field(default_factory=set)

    def token(self, name: str) -> bytes:
        return hashlib.sha256(f"nobody guesses {name} {self.number}".encode()).digest()

    def recognise(self, token: bytes, role: Role) -> Event | None:
        """What a token means to a side, which knows its hash alone."""
        for name in ("commit", "abort", "receipt"):
            known = hashlib.sha256(self.token(name)).digest()
            if _HEARD_BY[name] is role and hashlib.sha256(token).digest() == known:
                return Event[name.upper()]
        return None


@dataclass
class UnderWay:
    """A rule that a processor is at: its steps are acts, and None for the new state."""

    key: Key
    rule: Rule
    steps: list[Act | None]
    content: int


@dataclass
class Processor:
    """One secure processor.

    Attributes:
        owns: durable: the vTPM is its own.
        content: durable: what the vTPM's guest has written, as a number that grows.
        stored: durable: states of handoffs.
        kept: durable: the content of what came, by handoff.
        states: in memory.
        has_process: in memory: a process has the vTPM that it owns.
        is_running: and the guest can use it.
        copies: in memory: processes that have what came, with its content, by handoff.
        at: in memory.
    """

    owns: bool = False
    content: int = 0
    stored: dict[Key, State] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    states: dict[Key, State] = field(default_factory=dict)
    has_process: bool = False
    is_running: bool = False
    copies: dict[int, int] = field(default_factory=dict)
    at: UnderWay | None = None


@dataclass(frozen=True)
class Move:
    """Something that may happen.

    Attributes:
        is_fault: nothing of the kind happens any more once the end begins.
        rule: that it begins, with its role.
    """

    name: str
    make: Callable[[], None]
    is_fault: bool = False
    rule: tuple[Role, Rule] | None = None


class World:
    """The vTPM begins in processor 0.

    Args:
        source: the rules of a source.
        destination: the rules of a destination.
    """

    def __init__(self, source: tuple[Rule, ...] = SOURCE, destination: tuple[Rule, ...] = DESTINATION) -> None:
        self.tables = {Role.SOURCE: source, Role.DESTINATION: destination}
        self.processors = [Processor(owns=True, has_process=True, is_running=True), Processor()]
        self.handoffs = list[Handoff]()
        self.carried = list[tuple[int, str]]()  # tokens by handoff and name, in the order in which they were told
        self.written = 0  # what the guest was told to be durable
        self.history = list[str]()

    # What may happen

    def moves(self) -> Iterator[Move]:
        for number, processor in enumerate(self.processors):
            yield Move(f"crash of {number}", partial(self.crash, number), is_fault=True)
            if processor.is_running:
                yield Move(f"guest of {number} writes", partial(self._write, processor))
            if processor.at is not None:
                yield Move(f"{number} goes on", partial(self.go_on, number))
                if self._may_fail(processor.at):
                    yield Move(f"{number} fails", partial(self._fail, number), is_fault=True)
                continue
            if processor.owns and not processor.has_process:
                yield Move(f"boot at {number}", partial(self._boot, processor))
            if self._can_offer(number):
                yield Move(f"{number} offers", partial(self._offer, number))
            yield from self._events(number)
        for handoff in self.handoffs:
            if not handoff.is_cut:
                yield Move(f"link {handoff.number} is cut", partial(self.cut, handoff), is_fault=True)
        for token in self.carried:
            yield Move(f"{token[1]} token {token[0]} is lost", partial(self.carried.remove, token), is_fault=True)

    def _events(self, number: int) -> Iterator[Move]:
        """At a processor that is idle."""
        for handoff in self.handoffs:
            role = self._role(handoff, number)
            if role is Role.SOURCE:
                orders = tuple(
                    event for event in _ORDERS[role] if event is not Event.STOP or self.processors[number].is_running
                )
            else:
                orders = _ORDERS[role]
            for event in orders:
                yield self._take(number, handoff, event)
            if role in handoff.ends:
                if handoff.messages[role]:
                    yield self._receive(number, handoff, role)
                if handoff.is_cut:
                    yield self._take(number, handoff, Event.LINK_LOST, before=partial(self._close, handoff, role))
        for index, name in self.carried:  # anyone may bring any token to anyone
            token = self.handoffs[index].token(name)
            yield from self._bring(number, token, f"{name} {index}")

    def _bring(self, number: int, token: bytes, what: str) -> Iterator[Move]:
        for handoff in self.handoffs:
            event = handoff.recognise(token, self._role(handoff, number))
            if event is not None:
                yield self._take(number, handoff, event, what=what)

    def _receive(self, number: int, handoff: Handoff, role: Role) -> Move:
        message = handoff.messages[role][0]
        use_up = partial(handoff.messages[role].pop, 0)
        if isinstance(message, bytes):
            event = handoff.recognise(message, role)
            assert event is not None
            return self._take(number, handoff, event, before=use_up)
        return self._take(number, handoff, message[0], before=use_up, content=message[1])

    def _take(
        self,
        number: int,
        handoff: Handoff,
        event: Event,
        *,
        before: Callable[[], object] = lambda: None,
        content: int = 0,
        what: str = "",
    ) -> Move:
        """A processor takes up an event, or refuses it."""
        key = (handoff.number, self._role(handoff, number))
        state = self.processors[number].states[key]
        name = f"{number} as {key[1].name.lower()} of {key[0]}, {state.name}: {event.name} {what}".rstrip()
        try:
            rule = rule_for(self.tables[key[1]], state, event)
        except WrongState:
            # Whoever says what makes no sense is not listened to any more.
            is_message = event in _MESSAGES.values()
            return Move(f"{name}, refused", partial(self._refuse, handoff, before, cuts=is_message))
        steps = [*rule.before, None, *rule.then]

        def make() -> None:
            before()
            self.processors[number].at = UnderWay(key, rule, steps, content)

        return Move(name, make, rule=(key[1], rule))

    def _refuse(self, handoff: Handoff, before: Callable[[], object], *, cuts: bool) -> None:
        before()
        if cuts:
            self.cut(handoff)

    # What it does

    def make(self, move: Move) -> None:
        """Raises `AssertionError` if anything is wrong then."""
        self.history.append(move.name)
        move.make()
        self.look()

    def go_on(self, number: int) -> None:
        """One step of the rule that a processor is at."""
        processor = self.processors[number]
        at = processor.at
        assert at is not None
        act = at.steps.pop(0)
        if act is None:
            self._enter(processor, at)
        else:
            self._act(number, processor, at, act)
        if not at.steps:
            processor.at = None

    def _enter(self, processor: Processor, at: UnderWay) -> None:
        handoff, state = at.key[0], at.rule.to
        old = processor.states[at.key]
        if old is not state:
            self._check_change(at.key, old, state)
        processor.states[at.key] = state
        if not at.rule.is_durable:
            return
        processor.stored[at.key] = state
        if state is State.PREPARED:
            processor.kept[handoff] = at.content
        elif state is State.LIVE:
            processor.owns, processor.content = True, processor.kept.pop(handoff)
        elif state is State.EMPTY:
            processor.kept.pop(handoff, None)
        elif state is State.GONE:
            processor.owns = False

    def _act(self, number: int, processor: Processor, at: UnderWay, act: Act) -> None:
        handoff, role = self.handoffs[at.key[0]], at.key[1]
        if act is Act.STOP_VTPM:
            processor.is_running = False
        elif act is Act.LOAD_VTPM:
            processor.copies[handoff.number] = at.content
        elif act is Act.RUN_VTPM:
            if role is Role.DESTINATION:
                processor.has_process = processor.copies.pop(handoff.number, None) is not None
            processor.is_running = processor.has_process
        elif act is Act.DROP_VTPM:
            if role is Role.SOURCE:
                processor.has_process = False
            processor.copies.pop(handoff.number, None)
        elif act in _MESSAGES:
            self._send(handoff, role, (_MESSAGES[act], processor.content))
        else:
            self._tell(number, handoff, _TOKENS[act])

    def _send(self, handoff: Handoff, role: Role, message: tuple[Event, int] | bytes) -> None:
        other = Role.DESTINATION if role is Role.SOURCE else Role.SOURCE
        if role in handoff.ends and not handoff.is_cut:
            handoff.messages[other].append(message)

    def _tell(self, number: int, handoff: Handoff, name: str) -> None:
        handoff.told.add(name)
        if (handoff.number, name) not in self.carried:
            self.carried.append((handoff.number, name))
        self._send(handoff, self._role(handoff, number), handoff.token(name))

    def _may_fail(self, at: UnderWay) -> bool:
        return None in at.steps and (at.steps[0] is not None or at.rule.is_durable)

    def _fail(self, number: int) -> None:
        at = self.processors[number].at
        assert at is not None
        self.processors[number].at = None
        self.cut(self.handoffs[at.key[0]])  # or the other side would wait for ever

    def crash(self, number: int) -> None:
        """What is not durable is lost, and what is left is what the rules say."""
        processor = self.processors[number]
        processor.is_running = processor.has_process = False
        processor.at = None
        processor.copies.clear()
        for handoff in self.handoffs:
            role = self._role(handoff, number)
            key = (handoff.number, role)
            left = processor.stored.get(key, State.ABORTED if role is Role.SOURCE else State.EMPTY)
            says = rule_for(self.tables[role], processor.states[key], Event.CRASH).to
            assert left is says, f"after a crash it is {left.name}, and the rules say {says.name}"
            processor.states[key] = left
            self.cut(handoff)
            self._close(handoff, role)

    def cut(self, handoff: Handoff) -> None:
        handoff.is_cut = True

    def _close(self, handoff: Handoff, role: Role) -> None:
        handoff.ends.discard(role)
        handoff.messages[role].clear()

    def _boot(self, processor: Processor) -> None:
        processor.has_process = processor.is_running = True

    def _write(self, processor: Processor) -> None:
        processor.content += 1
        self.written += 1

    def _can_offer(self, number: int) -> bool:
        processor = self.processors[number]
        busy = {State.OFFERING, State.STOPPED} & set(processor.states.values())
        return processor.owns and processor.is_running and not busy and len(self.handoffs) < MOST_HANDOFFS

    def _offer(self, number: int) -> None:
        handoff = Handoff(len(self.handoffs), number)
        self.handoffs.append(handoff)
        self.processors[number].states[handoff.number, Role.SOURCE] = State.OFFERING
        self.processors[1 - number].states[handoff.number, Role.DESTINATION] = State.EXPECTING

    @staticmethod
    def _role(handoff: Handoff, number: int) -> Role:
        return Role.SOURCE if handoff.source == number else Role.DESTINATION

    # What must be so

    def _check_change(self, key: Key, old: State, new: State) -> None:
        handoff = self.handoffs[key[0]]
        source, destination = self.processors[handoff.source], self.processors[1 - handoff.source]
        if new is State.GONE:
            has_it = destination.stored.get((key[0], Role.DESTINATION)) is State.PREPARED
            assert has_it, "given up before the other has it"
        if (old, new) == (State.PREPARED, State.EMPTY):
            assert source.states[key[0], Role.SOURCE] not in {State.GONE, State.FORGOTTEN}, "thrown away, the last one"

    def look(self) -> None:
        """Whether anything is wrong now."""
        first, second = self.processors
        assert not (first.is_running and second.is_running), "it runs twice"
        assert not (first.owns and second.owns), "there are two"
        for processor in self.processors:
            assert not processor.is_running or processor.owns, "it runs where it is not owned"
            assert not processor.owns or processor.content == self.written, "an older vTPM, which had gone on elsewhere"
        for handoff in self.handoffs:
            assert not {"commit", "abort"} <= handoff.told, "both tokens were told"
            if "commit" in handoff.told:
                source = self.processors[handoff.source]
                given_up = source.stored.get((handoff.number, Role.SOURCE))
                assert given_up in {State.GONE, State.FORGOTTEN}, "told before it was given up"
        if not (first.owns or second.owns):
            assert self.written in [*first.kept.values(), *second.kept.values()], "there is none"

    # How it ends

    def come_to_an_end(self) -> None:
        """No more faults: everyone goes on, links that are of no use are closed, and carriers try again.

        Raises:
            AssertionError: anything is wrong on the way, or it does not end with exactly one.
        """
        self.history.append("the end begins")
        for _round in range(_MOST_ROUNDS):
            for handoff in self.handoffs:
                states = {
                    self.processors[number].states[handoff.number, self._role(handoff, number)] for number in (0, 1)
                }
                if states & {State.ABORTED, State.EMPTY}:
                    self.cut(handoff)
            if self.is_settled():
                return
            self._try_all()
        raise AssertionError("it does not end")

    def _try_all(self) -> None:
        """Whatever is open now, once."""
        names = [move.name for move in self.moves() if not move.is_fault and "CANCEL" not in move.name]
        for name in names:
            move = next((move for move in self.moves() if move.name == name), None)
            if move is not None and "offers" not in name:
                self.make(move)
                self.finish()

    def finish(self) -> None:
        """Processors do all the steps of what they are at."""
        for number, processor in enumerate(self.processors):
            while processor.at is not None:
                self.go_on(number)
                self.look()

    def is_settled(self) -> bool:
        """Exactly one, and nothing of a handoff is left open."""
        over = {State.ABORTED, State.FORGOTTEN, State.EMPTY, State.LIVE}
        return (
            [processor.owns for processor in self.processors].count(True) == 1
            and all(
                processor.at is None and not processor.copies and not processor.kept for processor in self.processors
            )
            and all(state in over for processor in self.processors for state in processor.states.values())
            and all(processor.owns or not processor.has_process for processor in self.processors)
        )
