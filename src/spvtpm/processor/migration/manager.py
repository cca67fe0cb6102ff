"""All handoffs of one secure processor: what the hypervisor commands of them, and what comes in at the migration socket.

A command about a handoff that is over, or of which only what is durable is left after a restart, is answered from that: so it
may be repeated until its answer has arrived.
"""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from typing import Final

from spvtpm.processor.migration.handoff import SOURCE, Event, State, rule_for
from spvtpm.processor.migration.incoming import Incoming
from spvtpm.processor.migration.outgoing import Outgoing
from spvtpm.processor.migration.realm import Realm
from spvtpm.processor.migration.tokens import check_token, derive_abort_token
from spvtpm.wire.errors import NotFound, SpvtpmError, TooMany, WrongState
from spvtpm.wire.messages import Handoff, HandoffToken, SendStopped

log = logging.getLogger(__name__)

MAX_HANDOFFS: Final = 64
"""Of each direction, at a time."""


class Migration:
    """What a hypervisor may command of handoffs.

    Args:
        realm: what they work on.
    """

    def __init__(self, realm: Realm) -> None:
        self._realm = realm
        self._outgoing: dict[bytes, Outgoing] = {}
        self._incoming: dict[bytes, Incoming] = {}

    # The source

    async def send_start(self, vm_id: uuid.UUID) -> Handoff:
        """Begins a handoff; one of the same VM that is under way ends.

        Raises:
            NotFound, WrongState, MigrationForbidden: the VM cannot leave.
            TooMany: so many are under way.
        """
        for handoff, other in list(self._outgoing.items()):
            if other.vm_id == vm_id:
                await self.send_cancel(vm_id, handoff)
        if len(self._outgoing) >= MAX_HANDOFFS:
            raise TooMany(f"{MAX_HANDOFFS} vTPMs are on their way already")
        async with self._realm.estate.table.lock(vm_id):
            begun = Outgoing(self._realm, self._realm.estate.table.get(vm_id), self._over)
        self._outgoing[begun.handoff] = begun
        return Handoff(begun.handoff)

    def _over(self, outgoing: Outgoing) -> None:
        """It has come to an end of which what is durable, or nothing, tells."""
        self._outgoing.pop(outgoing.handoff, None)

    async def send_stop(self, vm_id: uuid.UUID, handoff: bytes) -> SendStopped:
        """See `Outgoing.stop`."""
        return SendStopped(handoff, await self._leaving(vm_id, handoff).stop())

    def _leaving(self, vm_id: uuid.UUID, handoff: bytes) -> Outgoing:
        found = self._outgoing.get(handoff)
        if found is None or found.vm_id != vm_id:
            raise NotFound(f"VM {vm_id} is not under way in a handoff {handoff.hex()}")
        return found

    async def send_finish(self, vm_id: uuid.UUID, handoff: bytes) -> HandoffToken:
        """Gives the vTPM up, or tells the token of one that was given up.

        Raises:
            NotFound: nothing is known of such a handoff: if it ever was, its vTPM has stayed.
            SpvtpmError: as of `Outgoing.finish`.
        """
        departure = self._realm.departures.find(vm_id, handoff)
        if departure is None:
            return HandoffToken(handoff, await self._leaving(vm_id, handoff).finish())
        rule_for(SOURCE, State.GONE, Event.ASK_COMMIT)
        return HandoffToken(handoff, departure.commit)

    async def send_cancel(self, vm_id: uuid.UUID, handoff: bytes) -> HandoffToken:
        """The vTPM stays; tells so as often as it is asked, also when it is not here any more for another reason.

        Raises:
            WrongState: it was given up.
        """
        if self._realm.departures.find(vm_id, handoff) is not None:
            rule_for(SOURCE, State.GONE, Event.ASK_ABORT)
        if self._realm.departures.is_forgotten(handoff):
            rule_for(SOURCE, State.FORGOTTEN, Event.ASK_ABORT)
        found = self._outgoing.get(handoff)
        if found is not None and found.vm_id == vm_id:
            return HandoffToken(handoff, await found.cancel())
        rule_for(SOURCE, State.ABORTED, Event.ASK_ABORT)
        return HandoffToken(handoff, derive_abort_token(self._realm.abort_key, handoff, vm_id))

    async def send_forget(self, vm_id: uuid.UUID, handoff: bytes, receipt: bytes) -> Handoff:
        """The other side has the vTPM; once more does nothing.

        Raises:
            WrongToken: it is not the receipt.
        """
        async with self._realm.estate.table.lock(vm_id):
            departure = self._realm.departures.find(vm_id, handoff)
            if departure is not None:
                check_token(receipt, departure.receipt_sha256, "receipt")
                rule_for(SOURCE, State.GONE, Event.RECEIPT)
                async with self._realm.estate.ledger.lock:
                    await self._realm.estate.guard.milestone(self._realm.departures.forgetting(handoff))
        return Handoff(handoff)

    # The destination

    async def receive_start(self, vm_id: uuid.UUID, handoff: bytes, vm_uid: int | None) -> Handoff:
        """Expects a VM; once more does nothing.

        Raises:
            WrongState: it is here, or has come in this handoff already.
            PermissionRefused: `vm_uid` is no user of VMs.
            TooMany: so many are expected.
        """
        if handoff in self._incoming:
            return Handoff(handoff)
        if len(self._incoming) >= MAX_HANDOFFS:
            raise TooMany(f"{MAX_HANDOFFS} vTPMs are expected already")
        self._realm.users.check(vm_uid)
        expected = Incoming(self._realm, vm_id, handoff, vm_uid)
        if expected.state is not State.EXPECTING or self._realm.estate.table.has(vm_id):
            raise WrongState(f"migration: VM {vm_id} is here already")
        self._realm.admission.admit(vm_id)
        self._incoming[handoff] = expected
        return Handoff(handoff)

    def _coming(self, vm_id: uuid.UUID, handoff: bytes) -> Incoming:
        """One that is under way, or what is durable of one that was."""
        found = self._incoming.get(handoff)
        if found is not None and found.vm_id == vm_id:
            if found.state is not State.EMPTY:
                return found
            del self._incoming[handoff]
        durable = Incoming(self._realm, vm_id, handoff, None)
        if durable.state is State.EXPECTING:
            raise NotFound(f"nothing of VM {vm_id} has come in a handoff {handoff.hex()}")
        return durable

    async def receive_finish(self, vm_id: uuid.UUID, handoff: bytes, token: bytes) -> HandoffToken:
        """See `Incoming.finish`.

        Raises:
            NotFound: nothing of it has come.
        """
        coming = self._coming(vm_id, handoff)
        receipt = await coming.finish(token)
        self.link_ended(coming)
        return HandoffToken(handoff, receipt)

    async def receive_cancel(self, vm_id: uuid.UUID, handoff: bytes, token: bytes | None) -> Handoff:
        """See `Incoming.cancel`; of what is not there, nothing has to be thrown away."""
        with suppress(NotFound):
            await self._coming(vm_id, handoff).cancel(token)
            self._incoming.pop(handoff, None)
        return Handoff(handoff)

    # Connections

    def outgoing(self, handoff: bytes) -> Outgoing | None:
        """One that is under way from here."""
        return self._outgoing.get(handoff)

    def incoming(self, handoff: bytes) -> Incoming | None:
        """One that is under way to here."""
        return self._incoming.get(handoff)

    def link_ended(self, coming: Incoming) -> None:
        """A connection for it has ended; perhaps not the one that is its link. What is prepared waits for its token, loaded."""
        is_there = self._incoming.get(coming.handoff) is coming
        if is_there and not coming.is_linking and coming.state is not State.PREPARED:
            del self._incoming[coming.handoff]

    async def close(self) -> None:
        """What was not given up stays, and can be shut down in order."""
        for found in list(self._outgoing.values()):
            try:
                await found.cancel()
            except SpvtpmError as error:
                log.warning("VM %s: its migration cannot be ended: %s", found.vm_id, error)
