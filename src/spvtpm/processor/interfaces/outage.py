"""An interface whose vTPM has failed: every ring is answered with that, at most so often that a flood costs nothing."""

from __future__ import annotations

import asyncio
import logging

from spvtpm.processor.interfaces.direct import publish_outage
from spvtpm.processor.interfaces.offer import InterfaceOffer
from spvtpm.wire.crb import AttachError

log = logging.getLogger(__name__)

_PAUSE_S = 0.02


class Outage:
    """Answers until `end()`; once at once, for the VM may be waiting.

    Args:
        interface: whose rings nobody else looks at.
        name: of the vTPM, for the log.
    """

    def __init__(self, interface: InterfaceOffer, name: str) -> None:
        self._interface = interface
        self._name = name
        self._timer: asyncio.TimerHandle | None = None
        self._answer()

    def _answer(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._interface.offer.sp_doorbell)
        try:
            self._interface.drain_doorbell()
            tell_outage(self._interface, AttachError.TPM_FAILED)
        except OSError as error:  # nothing to map or ring with; tried again at the next ring
            log.error("%s: its VM cannot be told that it failed: %s", self._name, error.strerror)
        self._timer = loop.call_later(_PAUSE_S, self._listen)

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._interface.offer.sp_doorbell, self._answer)

    def end(self) -> None:
        """Answers no more."""
        if self._timer is not None:
            self._timer.cancel()
        asyncio.get_running_loop().remove_reader(self._interface.offer.sp_doorbell)


def tell_outage(interface: InterfaceOffer, error: AttachError) -> None:
    """Writes into the interface why nobody serves it, and rings.

    Raises:
        OSError: its memory cannot be mapped.
    """
    with interface.map() as memory:
        publish_outage(memory, error)
    interface.ring_vm()
