"""What both sides of a handoff work on."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from spvtpm.processor.admission import Admission
from spvtpm.processor.channel_identity import ChannelKeys
from spvtpm.processor.migration.departures import Departures
from spvtpm.processor.migration.handoff import Act, Event, Rule, State, rule_for
from spvtpm.processor.migration.peers import Peers
from spvtpm.processor.owner_commands import Estate
from spvtpm.processor.security_block import VmSecurityBlock
from spvtpm.processor.users import Users
from spvtpm.processor.vtpm import Vtpm
from spvtpm.processor.vtpm_services import Boot
from spvtpm.wire.errors import IntegrityError, PolicyError, WrongState


@dataclass(frozen=True, slots=True)
class Realm:
    """What both sides of a handoff work on.

    Attributes:
        estate: blocks, vTPMs, NV.
        users: who may have what.
        admission: which VMs may come.
        departures: vTPMs that have left.
        keys: who this secure processor is.
        peers: which others are genuine.
        abort_key: from which abort tokens are derived, 32 bytes.
    """

    estate: Estate
    users: Users
    admission: Admission
    departures: Departures
    keys: ChannelKeys
    peers: Peers
    abort_key: bytes = field(repr=False)

    def vtpm_of(self, block: VmSecurityBlock) -> Vtpm:
        """A VM's vTPM.

        Raises:
            WrongState: it has none.
        """
        if block.vtpm_id is None:
            raise WrongState(f"VM {block.vm_id} has no vTPM")
        return self.estate.vtpms.get(block.vtpm_id)

    def boot_of(self, block: VmSecurityBlock) -> Boot:
        """The boot that is under way."""
        assert block.boot_id is not None  # noqa: S101  # a running block has one
        return Boot(block.boot_id, block.boot_key(), self.users.of(block))


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
