"""The interface between the agent and whatever runs a VM: the VM's machine, not its vTPM.

A driver knows one kind of machine. The first is `emulated_vm.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from spvtpm.wire.memory_records import NewestRecords

MachineState = Literal["none", "starting", "running", "suspended", "halted"]
"""Of a machine: there is none; it comes up; it runs; nothing runs in it, and its memory is in its image; nothing runs in it."""


@dataclass(frozen=True, slots=True)
class Boot:
    """A boot that the secure processor has begun, for a machine to take part in.

    Attributes:
        boots: its number.
        interface: the socket on which the vTPM's interface is to be had; None: the VM has no vTPM.
        secret: the socket on which the VM key is to be had, once; None: the VM has its key by a way of its owner's.
        resumes: whether the machine goes on from its image.
    """

    boots: int
    interface: Path | None
    secret: Path | None
    resumes: bool


@dataclass(frozen=True, slots=True)
class Console:
    """Where a VM's owner's console goes in.

    Attributes:
        path: of the unix socket.
        pid: process id of who listens there, and nobody else.
    """

    path: Path
    pid: int


class VirtualMachine(Protocol):
    """One VM's machine. Calls on it come one after the other.

    Life: (`adopt` →) `start` → `suspend` → `go_on` or `end` … `stop`; and again from `start`.

    To another host: `copy_memory`, and again … `halt` → `finish_copy` → `stop`, or `go_on`; there `put_memory` → `start`.
    """

    @property
    def state(self) -> MachineState:
        """What it does now."""

    @property
    def boots(self) -> int:
        """Number of the boot that it takes part in; of no meaning while there is none."""

    @property
    def is_kept(self) -> bool:
        """Whether the host has anything of it."""

    @property
    def image(self) -> Path:
        """Where its memory is while it is suspended, and after; a file of ciphertext, or none."""

    @property
    def by_emulator(self) -> bool:
        """Whether its boots reach the vTPM by the TPM emulator interface, in clear, instead of by the direct path."""

    async def adopt(self) -> None:
        """Takes over a machine that was started by an agent that has died, if it still runs.

        Raises:
            ResourceError: it does not answer.
        """

    async def prepare(self) -> int | None:
        """Makes room for it; tells as which user it will run, for nobody else shall get its next boot's. None: the agent's.

        Raises:
            StorageError: there is no room.
        """

    async def start(self, boot: Boot) -> None:
        """Starts it; returns once it is ready.

        Raises:
            SpvtpmError: it did not come up, and nothing is left of it but an image that it was to go on from.
        """

    async def await_ready(self) -> None:
        """Returns once a machine that was adopted while it came up is ready.

        Raises:
            SpvtpmError: it did not come up, and nothing is left of it but an image that it was to go on from.
        """

    async def stop(self) -> None:
        """Powers it off in order; by force if it takes too long. Its memory is gone."""

    async def end(self) -> None:
        """Ends it at once: what it has in memory is of no use any more, or in its image."""

    async def tidy(self) -> None:
        """Clears away what it had in memory, if it has ended unasked."""

    async def suspend(self) -> None:
        """Lets nothing run in it any more, and makes its memory durable as its image.

        Raises:
            SpvtpmError: it cannot be suspended, and runs on.
        """

    def copy_memory(self, handoff_id: bytes) -> AsyncIterator[bytes]:
        """Records of what has changed in its memory since the last round of this handoff, sealed; it may run meanwhile.

        A round that is not taken to its end makes the whole copy worthless.

        Args:
            handoff_id: 16 bytes; another handoff begins anew.

        Raises:
            SpvtpmError: it cannot be copied, and runs on.
        """

    async def halt(self) -> None:
        """Lets nothing new run in it: what runs may end, for a while. Who comes to its console waits.

        Raises:
            SpvtpmError: it cannot be halted, and runs on.
        """

    def finish_copy(self, handoff_id: bytes, stop_nonce: bytes) -> AsyncIterator[bytes]:
        """The last records of the memory of one that is halted; the very last one vouches for all. Once in a handoff.

        Args:
            handoff_id: 16 bytes.
            stop_nonce: 32 bytes, that the secure processor has made when it had stopped the vTPM.

        Raises:
            SpvtpmError: it cannot be copied, and is halted still.
        """

    async def put_memory(self, memory: NewestRecords) -> None:
        """Stores memory that came from another host, durably, as the image with which a machine goes on.

        Args:
            memory: whole.

        Raises:
            MemoryStreamDamaged: the final record is missing.
            StorageError: it cannot be written.
        """

    async def go_on(self) -> None:
        """Lets it run on, as if it had not been suspended or halted.

        Raises:
            SpvtpmError: it cannot.
        """

    async def forget_image(self) -> None:
        """Removes the image, durably."""

    async def put_image(self, image: bytes) -> None:
        """Stores an image that was brought from elsewhere, durably.

        Raises:
            StorageError: it cannot be written.
        """

    async def read_image(self) -> bytes:
        """The image.

        Raises:
            StorageError: there is none, or it cannot be read.
        """

    async def remove(self) -> None:
        """Removes all that the host has of it. Only while there is no machine."""

    def console(self) -> Console:
        """Its console.

        Raises:
            WrongState: it does not run.
        """


class MachineDriver(Protocol):
    """One kind of machines."""

    def machine(self, vm_id: uuid.UUID, on_end: Callable[[], None]) -> VirtualMachine:
        """The machine of a VM; nothing runs yet.

        Args:
            vm_id: the VM.
            on_end: called in the event loop when it ends unasked.
        """

    def known(self) -> set[uuid.UUID]:
        """The VMs of which the host has anything."""
