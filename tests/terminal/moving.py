"""What a platform and its hosts' agents do together when a VM moves, with real secure processors, and no memory to speak of."""

from __future__ import annotations

import threading
import uuid
from contextlib import closing

from spvtpm.wire.errors import WrongState
from tests.harness import RunningSp
from tests.papers import todays_papers
from tests.processor.migration.two_chips import Handoff, honest, list_of
from tests.terminal.estate import VM_KEY

PATIENCE_S = 60


class Moving:
    """Moves vTPMs from chip to chip.

    Attributes:
        begun: a migration has begun.
        may_go_on: what has begun does not wait.
        vm_keys: of VMs that have others than those of estates: machines seal their memory with them.
    """

    def __init__(self) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()
        self.vm_keys: dict[uuid.UUID, bytes] = {}
        self._cancelled: set[uuid.UUID] = set()

    def cancel(self, operation_id: uuid.UUID) -> None:
        """An operation that waits does not go on."""
        self._cancelled.add(operation_id)
        self.may_go_on.set()

    def move(self, source: RunningSp, destination: RunningSp, vm_id: uuid.UUID, operation: uuid.UUID | None) -> None:
        """Moves one.

        Raises:
            WrongState: it was cancelled.
            SpvtpmError: a secure processor's refusal.
        """
        source.keep_key(vm_id, self.vm_keys.get(vm_id, VM_KEY))
        with closing(Handoff(source, destination, vm_id, honest, list_of(todays_papers()).encode())) as handoff:
            self.begun.set()
            self.may_go_on.wait(PATIENCE_S)
            if operation in self._cancelled:
                handoff.discard(handoff.cancel())
                raise WrongState("it was cancelled")
            handoff.move(b"memory")
