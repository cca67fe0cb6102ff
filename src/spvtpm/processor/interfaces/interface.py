"""What a way to a vTPM must be able to do, whichever it is: the direct path, or the TPM emulator interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

from spvtpm.processor.vtpm_services import Boot
from spvtpm.processor.worker.messages import DirectPort, InterfaceSnapshot, StreamPort


class Interface(Protocol):
    """The way to one vTPM, from the beginning of a boot to its end. A VM that is reset keeps it.

    Life: construct (allocates) → `listen()` → `leave_to_worker()`, `watch()`, `fail()`, `rest()`, in any order → `close()`.

    Attributes:
        path: of its socket.
        switched_by_vm: whether the VM's side switches the TPM on and off within a boot; otherwise it is on as long as that lasts.
    """

    path: Path
    switched_by_vm: ClassVar[bool]

    def listen(self) -> None:
        """Offers it.

        Raises:
            ResourceError: no socket can be had.
        """

    @property
    def connected(self) -> bool:
        """Whether a process holds it."""

    def port(self, vm_id: bytes, boot: Boot, snapshot: InterfaceSnapshot | None) -> DirectPort | StreamPort:
        """What a worker is to serve.

        Args:
            vm_id: 16 bytes.
            boot: that is under way.
            snapshot: of the port as it was parked, if it was.
        """

    def descriptors(self) -> list[int]:
        """What a worker needs for it; they stay the interface's."""

    def leave_to_worker(self) -> None:
        """A worker serves it from now on."""

    def watch(self, wake: Callable[[], None]) -> None:
        """No worker serves it from now on; `wake` is called once the VM wants its TPM."""

    def fail(self) -> None:
        """Nobody serves it from now on; whoever asks for something is told."""

    def rest(self) -> None:
        """The TPM is off."""

    def close(self) -> None:
        """Takes it away."""
