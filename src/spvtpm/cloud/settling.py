"""Brings a handoff to its end by what the VM's source says: its secure processor alone decides. Steps and watch come in.

Everything here may be repeated, by several at once and in any order: what was learnt is written down once, and each order says
how the VM shall be. That exactly one host runs the VM is the secure processors' work (docs/formats/migration.md); this one has
the host's name in the VM's row agree with them, and carries their tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spvtpm.cloud import handoffs, hosts
from spvtpm.cloud.agents import AWAY
from spvtpm.cloud.plans import FINISHING, SWEEPING, UNDOING
from spvtpm.wire.agent_api import Order, VmReport
from spvtpm.wire.errors import MessageError, SpvtpmError
from spvtpm.wire.platform_errors import Superseded, Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from spvtpm.cloud.agents import Agent, Agents
    from spvtpm.cloud.handoffs import Handoff

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settler:
    """Settles handoffs.

    Attributes:
        database: the platform's.
        agents: of all hosts.
    """

    database: Engine
    agents: Agents

    def decide(self, handoff: Handoff) -> Handoff:
        """Has the VM be at one of the two hosts from now on. One whose handoff is open stays where it is, if it still can.

        Raises:
            Unavailable: a host that has to be asked or ordered is away.
            SpvtpmError: what it answers instead.
        """
        if handoff.outcome == "open":
            handoff = self.take_back(handoff)
        if handoff.outcome == "gone" and handoff.receipt is None:
            handoff = self._go_on(handoff)
        return handoff

    def take_back(self, handoff: Handoff) -> Handoff:
        """Has the source keep an open handoff's VM. If its secure processor has given it up already, it is gone.

        Raises:
            Unavailable: the source is away, or has not decided.
            SpvtpmError: what it answers instead.
        """
        agent = self._agent(handoff.source)
        refusal: SpvtpmError = Unavailable(f"host {handoff.source} has not decided yet what becomes of the VM")
        try:
            report = agent.order(handoff.vm_id, Order(sequence=handoff.sequence + UNDOING, want="running"))
        except AWAY:
            raise
        except SpvtpmError as error:
            refusal, report = error, agent.vm_report(handoff.vm_id)
        heard = self.hear(handoff, report)
        if heard.outcome != "open":
            return heard
        if isinstance(refusal, Superseded):  # by whoever has settled it meanwhile
            raise Unavailable(str(refusal))
        if _is_untouched(handoff, report):
            with self.database.begin() as connection:
                handoffs.never_begun(connection, handoff.operation)
            return self._read(handoff)
        raise refusal

    def hear(self, handoff: Handoff, report: VmReport) -> Handoff:
        """Writes down what the source says of the handoff, if it is its end."""
        found = report.handoff
        if found is None or found.handoff != handoff.handoff or found.outcome not in {"kept", "gone"}:
            return handoff
        if found.outcome == "gone" and found.token is None:
            raise MessageError(f"host {handoff.source} says that the VM has gone, and does not give what proves it")
        with self.database.begin() as connection:
            handoffs.hear(connection, handoff.operation, found)
        return self._read(handoff)

    def tell(self, handoff: Handoff) -> None:
        """Tells both sides the end of a decided handoff.

        Raises:
            Unavailable: one of them is away.
            SpvtpmError: what one of them answers instead.
        """
        if handoff.is_told:
            return
        first, number = handoff.sequence, handoff.handoff
        if handoff.outcome == "gone":
            forget = Order(sequence=first + SWEEPING, want="absent", handoff=number, token=handoff.receipt)
            self._tell(handoff.source, handoff, forget)
        else:
            if number is not None:
                end = Order(sequence=first + UNDOING, want="absent", handoff=number, token=handoff.token)
                self._tell(handoff.destination, handoff, end)
            self._reassure(handoff)
        with self.database.begin() as connection:
            handoffs.mark_told(connection, handoff.operation)

    def tell_if_possible(self, handoff: Handoff) -> None:
        """Tells both sides the end of a decided handoff; who cannot hear it now is told later (`settle_left_behind`)."""
        try:
            self.tell(handoff)
        except SpvtpmError as error:
            logger.info("the end of handoff %s of VM %s is told later: %s", handoff.handoff, handoff.vm_id, error)

    def settle_left_behind(self, handoff: Handoff) -> None:
        """Brings a handoff whose operation is over to its end, as far as the hosts can be reached."""
        try:
            self.tell(self.decide(handoff))
        except SpvtpmError as error:
            logger.info("handoff %s of VM %s is not settled yet: %s", handoff.handoff, handoff.vm_id, error)
            return
        with self.database.begin() as connection:
            handoffs.forget_told(connection, handoff.operation)
        logger.info("handoff %s of VM %s is settled", handoff.handoff, handoff.vm_id)

    def _go_on(self, handoff: Handoff) -> Handoff:
        agent = self._agent(handoff.destination)
        order = Order(
            sequence=handoff.sequence + FINISHING,
            want="running",
            handoff=handoff.handoff,
            token=handoff.token,
        )
        refusal: SpvtpmError = MessageError(f"host {handoff.destination} does not say that the VM has come")
        try:
            report = agent.order(handoff.vm_id, order)
        except AWAY:
            raise
        except SpvtpmError as error:  # it may have come all the same, and not boot
            refusal, report = error, agent.vm_report(handoff.vm_id)
        found = report.handoff
        if found is None or found.handoff != handoff.handoff or found.outcome != "come" or found.token is None:
            raise refusal
        with self.database.begin() as connection:
            handoffs.arrive(connection, handoff, found.token)
        return self._read(handoff)

    def _reassure(self, handoff: Handoff) -> None:
        """Has the source's VM be an ordinary one again. Whatever is wrong with it, that is not the handoff's any more."""
        try:
            self._tell(handoff.source, handoff, Order(sequence=handoff.sequence + UNDOING, want="running"))
        except AWAY:
            raise
        except SpvtpmError as error:
            logger.info("host %s keeps VM %s: %s", handoff.source, handoff.vm_id, error)

    def _tell(self, host: str, handoff: Handoff, order: Order) -> None:
        with self.database.connect() as connection:
            agent = hosts.agent_if_known(connection, self.agents, host)
        if agent is None:
            return
        try:
            agent.order(handoff.vm_id, order)
        except Superseded:  # it has newer orders: it was told before
            logger.info("host %s has newer orders for VM %s", host, handoff.vm_id)

    def _agent(self, host: str) -> Agent:
        with self.database.connect() as connection:
            agent = hosts.agent_if_known(connection, self.agents, host)
        if agent is None:
            raise Unavailable(f"there is no host {host} any more")
        return agent

    def _read(self, handoff: Handoff) -> Handoff:
        with self.database.connect() as connection:
            found = handoffs.find(connection, handoff.operation)
        if found is None:  # it was settled by somebody else, from begin to end
            raise Unavailable(f"the move of VM {handoff.vm_id} was settled meanwhile")
        return found


def _is_untouched(handoff: Handoff, report: VmReport) -> bool:
    """Whether a source that was told to keep the VM has it, and nothing of the handoff: that was never begun, or is forgotten.

    What it has of an earlier one, in which the VM stayed or came, says nothing of this.
    """
    found, block = report.handoff, report.security_block
    if found is not None and (found.outcome not in {"kept", "come"} or found.handoff == handoff.handoff):
        return False
    return handoff.handoff is None or (block is not None and block.state != "leaving")
