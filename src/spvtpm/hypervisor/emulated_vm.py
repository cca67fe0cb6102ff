"""The first kind of machine: a process for each VM that has the VM's memory and runs its programs, `spvtpm guest machine`.

Below the agent's directory, for each VM:

    vms/<vm id>/boot       the boot that its machine takes part in
    vms/<vm id>/log        what its machine says
    vms/<vm id>/machine/   the machine's own: its sockets, its memory, its image; another user's, if VMs have users of their own

A machine has a session of its own, and outlives the agent. A new agent finds it by its command line.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, TypeVar

from spvtpm.hypervisor.frames import connected
from spvtpm.hypervisor.machine_link import ask_machine
from spvtpm.hypervisor.process_machine import ProcessMachine
from spvtpm.hypervisor.virtual_machine import Boot, Console
from spvtpm.wire.errors import NotRunning, SpvtpmError, StorageError, WrongState
from spvtpm.wire.machine_control import (
    MAX_CONTROL_BYTES,
    AwaitReady,
    ControlRequest,
    CopyMemory,
    FinishCopy,
    GoOn,
    Halt,
    MemoryCopied,
    PowerOff,
    Suspend,
)
from spvtpm.wire.machine_control import MachineState as MachineIs
from spvtpm.wire.memory_records import NewestRecords, Record, split_records
from spvtpm.wire.platform_errors import MachineFailed

log = logging.getLogger(__name__)

_Reply = TypeVar("_Reply", MachineIs, MemoryCopied)

_READY_S: Final = 60.0
_LOOK_S: Final = 0.02
_POWER_OFF_S: Final = 20.0
_SUSPEND_S: Final = 60.0
_ADOPT_S: Final = 10.0


class EmulatedVm(ProcessMachine):
    """A VM whose machine is a process. A `VirtualMachine`.

    Args:
        vm_id: the VM.
        directory: what the agent has of it.
        users: whose processes machines are.
        on_end: called when it ends unasked.
        left: process id of a machine of it that an earlier agent has started.
    """

    async def _find_state(self) -> None:
        if await self._is_starting():
            self._state = "starting"
        else:
            await self._change(AwaitReady(), _ADOPT_S)

    async def _is_starting(self) -> bool:
        """Whether it is too young to answer."""
        try:
            async with connected(self._own / "control.sock", "machine", MAX_CONTROL_BYTES):
                return False
        except NotRunning:
            return True

    async def start(self, boot: Boot) -> None:
        """Starts it; returns once it is ready.

        Raises:
            MachineFailed: it did not come up.
            StorageError: there is no room for it.
            WrongState: its owner has it get its key elsewhere.
        """
        if boot.secret is None:
            raise WrongState(
                f"VM {self._vm_id} does not get its key from the secure processor: its owner did not want that"
            )
        try:
            self._directory.make_room()
            await self._clear()
            self._directory.note_boot(boot)
            self._boots = boot.boots
            self._spawn(self._command(boot, boot.secret))
        except OSError as error:
            raise StorageError(f"no machine for VM {self._vm_id}: {error.strerror or error}") from None
        await self.await_ready()

    async def await_ready(self) -> None:
        """Returns once it is ready.

        Raises:
            MachineFailed: it did not come up; nothing is left of it but an image.
        """
        process = self._process
        assert process is not None  # noqa: S101  # it is starting
        try:
            async with asyncio.timeout(_READY_S):
                while await self._is_starting():
                    if await process.wait(_LOOK_S):
                        raise MachineFailed(f"the machine of VM {self._vm_id} has ended")
                await self._change(AwaitReady(), _READY_S)
        except (SpvtpmError, TimeoutError) as error:
            await self.end()
            why = str(error) or f"it was not ready after {_READY_S:g} s"
            raise MachineFailed(
                f"the machine of VM {self._vm_id} did not come up: {why}{self._directory.last_words()}"
            ) from None

    async def stop(self) -> None:
        """Powers it off in order; by force if it takes too long. Its memory is gone."""
        process = self._process
        if process is not None and self._state in ("running", "halted"):
            try:
                await self._ask(PowerOff(), MachineIs, _POWER_OFF_S)
                await process.wait(_POWER_OFF_S)
            except SpvtpmError as error:
                log.warning("VM %s: its machine is not powered off in order: %s", self._vm_id, error)
        await self.end()

    async def suspend(self) -> None:
        """Lets nothing run in it any more, and makes its memory durable as its image.

        Raises:
            SpvtpmError: it cannot be suspended, and runs on.
        """
        await self._change(Suspend(), _SUSPEND_S)
        if self._state != "suspended" or not self.image.is_file():
            raise MachineFailed(f"the machine of VM {self._vm_id} was to be suspended, and is not")

    async def go_on(self) -> None:
        """Lets it run on.

        Raises:
            SpvtpmError: it cannot.
        """
        await self._change(GoOn(), _SUSPEND_S)

    async def copy_memory(self, handoff_id: bytes) -> AsyncIterator[bytes]:
        """Records of what has changed in its memory since the last round of this handoff.

        Raises:
            SpvtpmError: it cannot be copied, and runs on.
        """
        for record in await self._copied(CopyMemory(handoff_id=handoff_id)):
            yield record.data

    async def halt(self) -> None:
        """Lets nothing new run in it.

        Raises:
            SpvtpmError: it cannot be halted, and runs on.
        """
        await self._change(Halt(), _SUSPEND_S)
        if self._state != "halted":
            raise MachineFailed(f"the machine of VM {self._vm_id} was to be halted, and is not")

    async def finish_copy(self, handoff_id: bytes, stop_nonce: bytes) -> AsyncIterator[bytes]:
        """The last records of its memory, with the final one.

        Raises:
            SpvtpmError: it cannot be copied, and is halted still.
        """
        for record in await self._copied(FinishCopy(handoff_id=handoff_id, stop_nonce=stop_nonce)):
            yield record.data

    async def _copied(self, request: CopyMemory | FinishCopy) -> list[Record]:
        reply = await self._ask(request, MemoryCopied, _SUSPEND_S)
        copy = await self._directory.read_copy()
        records = list(split_records(copy))
        if (reply.records, reply.bytes) != (len(records), len(copy)):
            raise MachineFailed(f"the machine of VM {self._vm_id} has written something else than it says")
        return records

    async def put_memory(self, memory: NewestRecords) -> None:
        """Stores its memory as it came from another host, durably, as its image.

        Raises:
            MemoryStreamDamaged: the final record is missing.
            StorageError: it cannot be written.
        """
        await self._directory.put_image(memory.stream())

    async def put_image(self, image: bytes) -> None:
        """Stores an image that was brought from elsewhere, durably.

        Raises:
            StorageError: it cannot be written.
        """
        await self._directory.put_image(image)

    async def read_image(self) -> bytes:
        """The image.

        Raises:
            StorageError: there is none, or it is too long.
        """
        return await self._directory.read_image()

    def console(self) -> Console:
        """Its console.

        Raises:
            WrongState: it does not run.
        """
        if self._state not in ("running", "halted") or self._process is None:  # a halted one lets them wait
            raise WrongState(f"VM {self._vm_id} does not run, so there is nobody at its console")
        return Console(self._own / "console.sock", self._process.pid)

    def _command(self, boot: Boot, secret: Path) -> list[str]:
        command = [sys.executable, "-m", "spvtpm.cli", "guest", "machine", str(self._own), "--vm", str(self._vm_id)]
        command += ["--secret", str(secret)]
        if boot.interface is not None:
            command += ["--interface", str(boot.interface)]
        if boot.resumes:
            command.append("--resume")
        return command

    async def _change(self, request: ControlRequest, timeout_s: float) -> None:
        """Has it become something else, and takes note of what it says that it is."""
        reply = await self._ask(request, MachineIs, timeout_s)
        if reply.state == "off":
            raise MachineFailed(f"the machine of VM {self._vm_id} is off")
        self._state = reply.state

    async def _ask(self, request: ControlRequest, answer: type[_Reply], timeout_s: float) -> _Reply:
        return await ask_machine(self._own / "control.sock", self._vm_id, request, answer, timeout_s, self.pid)
