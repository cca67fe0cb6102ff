"""Carries the link of a handoff until the VM's source says what became of it. `moves.py` comes in.

The source moves the VM by itself once it has its link, and takes it back by itself if that fails. All that is done here is to
carry, to look, and to have it taken back where that is to be.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from spvtpm.cloud import host_addresses, hosts, operations
from spvtpm.cloud.agents import AWAY
from spvtpm.cloud.link_relay import LinkRelay
from spvtpm.wire.errors import ResourceError, SpvtpmError
from spvtpm.wire.platform_errors import Cancelled, Unavailable

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from spvtpm.cloud.handoffs import Handoff
    from spvtpm.cloud.undertakings import Undertaking
    from spvtpm.wire.agent_api import HandoffReport

_LOOK_EVERY_S: Final = 0.5
_STANDSTILL_S: Final = 60.0
_AFTER_LINK_S: Final = 10.0
"""For the source to take back a VM whose link has ended, and for a link's last frames once the VM has gone."""


class Carrying:
    """One handoff's link, from its source's first word to its last."""

    def __init__(self, work: Undertaking, handoff: Handoff) -> None:
        """
        Args:
            work: the migration.
            handoff: open, and expected at both sides.
        """
        self._work = work
        self._handoff = handoff
        self._link: LinkRelay | None = None
        self._copied = -1
        now_s = time.monotonic()
        self._heard_s = self._copied_s = self._linked_s = now_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._link is not None:
            self._link.close()

    def run(self) -> Handoff:
        """The handoff, once the VM has gone.

        Raises:
            SpvtpmError: why it was kept; or the source is away, and nobody knows.
        """
        while True:
            self._look()
            if self._handoff.outcome == "open":
                reason = self._reason_to_end()
                if reason is not None:
                    self._handoff = self._work.settler.take_back(self._handoff)
                    if self._handoff.outcome == "kept":
                        raise reason
            match self._handoff.outcome:
                case "gone":
                    if self._link is not None:
                        self._link.wait(_AFTER_LINK_S)
                    return self._handoff
                case "kept":
                    raise why_kept(self._handoff)
            self._work.pause(_LOOK_EVERY_S)

    def _look(self) -> None:
        handoff = self._handoff
        try:
            with self._work.database.connect() as connection:
                agent = hosts.agent_of(connection, self._work.agents, handoff.source)
            report = agent.vm_report(handoff.vm_id)
        except AWAY:
            is_carrying = self._link is not None and not self._link.has_ended
            if not is_carrying or time.monotonic() - self._heard_s > _STANDSTILL_S:
                raise
            return
        self._heard_s = time.monotonic()
        self._handoff = self._work.settler.hear(handoff, report)
        found = report.handoff
        if self._handoff.outcome == "open" and found is not None and found.handoff == handoff.handoff:
            self._follow(found)

    def _follow(self, found: HandoffReport) -> None:
        if found.copied_bytes != self._copied:
            self._copied, self._copied_s = found.copied_bytes, time.monotonic()
            self._work.say(self._words())
        if self._link is None and not found.is_linked:
            self._link = self._new_link()
        if self._link is None or not self._link.has_ended:
            self._linked_s = time.monotonic()

    def _words(self) -> str:
        copied = f"{self._copied / (1 << 20):.1f} MiB of its memory copied"
        return f"moving the VM from host {self._handoff.source} to host {self._handoff.destination}: {copied}"

    def _new_link(self) -> LinkRelay:
        handoff = self._handoff
        with self._work.database.connect() as connection:
            source, destination = (
                host_addresses.agent_of_host(connection, host) for host in (handoff.source, handoff.destination)
            )
        return LinkRelay(source, destination, f"/v1/vms/{handoff.vm_id}/link?handoff={handoff.handoff}")

    def _reason_to_end(self) -> SpvtpmError | None:
        now_s = time.monotonic()
        try:
            with self._work.database.connect() as connection:
                operations.verify_wanted(connection, self._work.operation_id)
        except Cancelled as cancelled:
            return cancelled
        if self._link is not None and self._link.failure is not None:
            return self._link.failure
        if now_s - self._linked_s > _AFTER_LINK_S:
            return Unavailable("the link between the hosts was lost")
        if now_s - self._copied_s > _STANDSTILL_S:
            return ResourceError(f"nothing of the VM was copied for {_STANDSTILL_S:g} s")
        return None


def why_kept(handoff: Handoff) -> SpvtpmError:
    """Why the VM stays, as its source says."""
    return ResourceError(f"the VM stays at host {handoff.source}: {handoff.failure or 'it was taken back'}")
