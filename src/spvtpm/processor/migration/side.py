"""One side of a handoff, as its table of rules has it (`handoff.py`): interprets the rules, and does nothing else."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence

from spvtpm.processor.migration.handoff import Act, Event, Rule, State, rule_for
from spvtpm.wire.errors import IntegrityError, PolicyError, WrongState


class Side:
    """One side of a handoff, which does what the rules say and nothing else. Whoever calls `advance` holds the VM's lock.

    Args:
        vm_id: the VM.
        handoff: its id, 16 bytes.
        state: in which it begins.
        rules: of this side.
        acts: how each act is done.
        store: makes a state durable.
    """

    def __init__(
        self,
        vm_id: uuid.UUID,
        handoff: bytes,
        state: State,
        rules: Sequence[Rule],
        acts: Mapping[Act, Callable[[], Awaitable[None]]],
        store: Callable[[State], Awaitable[None]],
    ) -> None:
        self.vm_id = vm_id
        self.handoff = handoff
        self.state = state
        self._rules = rules
        self._acts = acts
        self._store = store
        self._in_doubt: Event | None = None  # its store has failed, or was not waited for: it may be durable

    async def advance(self, event: Event) -> None:
        """Follows the rule for an event.

        A new state that may be durable or not can only be tried again: whoever went another way meanwhile might find after a
        crash that he has gone both.

        Raises:
            WrongState: there is none in this state, or another event is in doubt.
            SpvtpmError: of what comes before the new state; the side is as it was. Or of what comes then.
        """
        rule = rule_for(self._rules, self.state, event)
        if self._in_doubt not in (None, event):
            raise WrongState(
                f"migration: {self._in_doubt.name.lower()} may have become durable, and has to be tried again"
            )
        for act in rule.before:
            await self._acts[act]()
        if rule.is_durable:
            was_in_doubt, self._in_doubt = self._in_doubt, event
            try:
                await self._store(rule.to)
            except (PolicyError, IntegrityError):  # before anything was written
                self._in_doubt = was_in_doubt
                raise
            self._in_doubt = None
        self.state = rule.to
        for act in rule.then:
            await self._acts[act]()
