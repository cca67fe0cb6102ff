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
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, TypeVar

from spvtpm.hypervisor.frames import connected
from spvtpm.hypervisor.machine_directory import MachineDirectory
from spvtpm.hypervisor.machine_link import ask_machine
from spvtpm.hypervisor.machine_process import MachineProcess
from spvtpm.hypervisor.virtual_machine import Boot, Console, MachineState
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.decoding import UNDECODABLE
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


class EmulatedVm:
    """A VM whose machine is a process. A `VirtualMachine`.

    Args:
        vm_id: the VM.
        directory: what the agent has of it.
        users: whose processes machines are.
        on_end: called when it ends unasked.
        left: process id of a machine of it that an earlier agent has started.
    """

    def __init__(
        self, vm_id: uuid.UUID, directory: Path, users: VmUsers, on_end: Callable[[], None], left: int | None = None
    ) -> None:
        self._vm_id = vm_id
        self._directory = MachineDirectory(directory, users)
        self._own = self._directory.own
        self._users = users
        self._on_end = on_end
        self._left = left
        self._process: MachineProcess | None = None
        self._state: MachineState = "none"
        self._boots = 0
        self._has_remains = False

    @property
    def state(self) -> MachineState:
        """What it does now."""
        return self._state

    @property
    def boots(self) -> int:
        """Number of the boot that it takes part in."""
        return self._boots

    @property
    def is_kept(self) -> bool:
        """Whether the host has anything of it."""
        return self._directory.path.is_dir()

    @property
    def image(self) -> Path:
        """Where its memory is while it is suspended, and after."""
        return self._directory.image

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return self._process.pid if self._process is not None else None

    async def adopt(self) -> None:
        """Takes over a machine that an agent which has died had started; one that does not answer is ended."""
        left, self._left = self._left, None
        if left is None:
            await self._clear()
            return
        try:
            self._watch(left)
            self._boots = self._directory.boots()
            if await self._is_starting():
                self._state = "starting"
            else:
                await self._change(AwaitReady(), _ADOPT_S)
            log.info("VM %s: its machine, process %d, goes on", self._vm_id, left)
        except (SpvtpmError, OSError, *UNDECODABLE) as error:
            log.warning("VM %s: its machine is of no use and ended: %s", self._vm_id, error)
            await self.end()

    async def _is_starting(self) -> bool:
        """Whether it is too young to answer."""
        try:
            async with connected(self._own / "control.sock", "machine", MAX_CONTROL_BYTES):
                return False
        except NotRunning:
            return True

    async def prepare(self) -> int | None:
        """Makes room for it; tells as which user it will run.

        Raises:
            StorageError: there is no room.
        """
        try:
            self._directory.make_room()
            uid = self._directory.uid
        except OSError as error:
            raise StorageError(f"no room for the machine of VM {self._vm_id}: {error.strerror or error}") from None
        return None if uid == os.geteuid() else uid

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
            self._spawn(boot, boot.secret)
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

    async def end(self) -> None:
        """Ends it at once, and clears away what it had in memory."""
        process, self._process = self._process, None
        self._state = "none"
        if process is not None:
            await process.kill()
        await self._clear()

    async def tidy(self) -> None:
        """Clears away what it had in memory, if it has ended unasked."""
        if self._has_remains:
            await self._clear()

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

    async def forget_image(self) -> None:
        """Removes the image, durably."""
        await self._directory.forget_image()

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

    async def remove(self) -> None:
        """Removes all that the host has of it.

        Raises:
            StorageError: something cannot be removed.
        """
        await self._directory.remove()

    def console(self) -> Console:
        """Its console.

        Raises:
            WrongState: it does not run.
        """
        if self._state not in ("running", "halted") or self._process is None:  # a halted one lets them wait
            raise WrongState(f"VM {self._vm_id} does not run, so there is nobody at its console")
        return Console(self._own / "console.sock", self._process.pid)

    async def _clear(self) -> None:
        self._has_remains = False
        await self._directory.clear()

    def _spawn(self, boot: Boot, secret: Path) -> None:
        command = [sys.executable, "-m", "spvtpm.cli", "guest", "machine", str(self._own), "--vm", str(self._vm_id)]
        command += ["--secret", str(secret)]
        if boot.interface is not None:
            command += ["--interface", str(boot.interface)]
        if boot.resumes:
            command.append("--resume")
        with (self._directory.path / "log").open("wb") as sink:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                cwd=self._own,
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._own), "LANG": "C.UTF-8"},
                start_new_session=True,
                umask=0o077,
                **self._users.identity(self._directory.uid),
            )
        child.returncode = 0  # it is watched by its descriptor, and buried there
        self._watch(child.pid)
        self._state = "starting"

    def _watch(self, pid: int) -> None:
        self._process = MachineProcess(pid, self._ended, self._users.alone(self._directory.uid))

    def _ended(self) -> None:
        process = self._process
        if process is not None and process.ended.is_set():
            log.warning(
                "VM %s: its machine, process %d, has ended%s", self._vm_id, process.pid, self._directory.last_words()
            )
            self._process, self._state, self._has_remains = None, "none", True
            self._on_end()

    async def _change(self, request: ControlRequest, timeout_s: float) -> None:
        """Has it become something else, and takes note of what it says that it is."""
        reply = await self._ask(request, MachineIs, timeout_s)
        if reply.state == "off":
            raise MachineFailed(f"the machine of VM {self._vm_id} is off")
        self._state = reply.state

    async def _ask(self, request: ControlRequest, answer: type[_Reply], timeout_s: float) -> _Reply:
        return await ask_machine(self._own / "control.sock", self._vm_id, request, answer, timeout_s, self.pid)
