"""The direct path as a vTPM's interface: shared memory and doorbells, and who looks at the doorbell when no worker does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from spvtpm.processor.interfaces.offer import InterfaceOffer
from spvtpm.processor.interfaces.outage import Outage, tell_outage
from spvtpm.processor.vtpm_services import Boot
from spvtpm.processor.worker.messages import DirectPort, InterfaceSnapshot
from spvtpm.wire.crb import AttachError


class DirectPath(InterfaceOffer):
    """One vTPM's direct path. Its TPM is on as long as the boot lasts.

    Args:
        path: where its socket will listen.
        allowed_uids: whose processes may take it.
        name: of the vTPM, for the log.

    Raises:
        ResourceError: no memory or descriptors can be had.
    """

    switched_by_vm: ClassVar[bool] = False

    def __init__(self, path: Path, allowed_uids: frozenset[int], name: str) -> None:
        super().__init__(path, allowed_uids)
        self._name = name
        self._outage: Outage | None = None

    def port(self, vm_id: bytes, boot: Boot, snapshot: InterfaceSnapshot | None) -> DirectPort:
        """What a worker is to serve; with the boot's key."""
        return DirectPort(vm_id, boot.boot_id, boot.key, snapshot)

    def descriptors(self) -> list[int]:
        """Memory and doorbells."""
        return list(self.offer)

    def leave_to_worker(self) -> None:
        """A worker looks at the doorbell."""
        asyncio.get_running_loop().remove_reader(self.offer.sp_doorbell)
        if self._outage is not None:
            self._outage.end()
            self._outage = None

    def watch(self, wake: Callable[[], None]) -> None:
        """`wake` is called at the next ring, which stays in the doorbell for the worker to find."""

        def woken() -> None:
            self.leave_to_worker()
            wake()

        asyncio.get_running_loop().add_reader(self.offer.sp_doorbell, woken)

    def fail(self) -> None:
        """Every ring is answered with that."""
        self._outage = Outage(self, self._name)

    def rest(self) -> None:
        """Nothing: between two boots of a VM that is reset, its memory is as it was."""

    def close(self) -> None:
        """Takes the interface away, and says so in its memory."""
        self.leave_to_worker()
        tell_outage(self, AttachError.POWERED_OFF)
        super().close()
