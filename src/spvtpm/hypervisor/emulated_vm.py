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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec

from spvtpm.files import read_file, replace_file, sync_directory
from spvtpm.files.removal import remove_tree
from spvtpm.hypervisor.frames import ask, connected
from spvtpm.hypervisor.machine_process import MachineProcess
from spvtpm.hypervisor.virtual_machine import Boot, Console, MachineState
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.agent_api import MAX_IMAGE_BYTES
from spvtpm.wire.decoding import UNDECODABLE, printable
from spvtpm.wire.errors import (
    MessageError,
    NotRunning,
    SpvtpmError,
    StorageError,
    WrongState,
    error_from_code,
)
from spvtpm.wire.machine_control import (
    MAX_CONTROL_BYTES,
    AwaitReady,
    ControlRequest,
    GoOn,
    PowerOff,
    Suspend,
    encode_control,
    parse_control_reply,
)
from spvtpm.wire.machine_control import MachineState as MachineIs
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.platform_errors import MachineFailed

log = logging.getLogger(__name__)

_READY_S: Final = 60.0
_LOOK_S: Final = 0.02
_POWER_OFF_S: Final = 20.0
_SUSPEND_S: Final = 60.0
_ADOPT_S: Final = 10.0
_MAX_LOG_BYTES: Final = 65_536
_MAX_BOOT_BYTES: Final = 4096


class _BootRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    boots: int
    resumes: bool


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
        self._directory = directory
        self._own = directory / "machine"
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
        return self._directory.is_dir()

    @property
    def image(self) -> Path:
        """Where its memory is while it is suspended, and after."""
        return self._own / "image"

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
            record = msgspec.json.decode(read_file(self._directory / "boot", _MAX_BOOT_BYTES), type=_BootRecord)
            self._boots = record.boots
            if await self._is_starting():
                self._state = "starting"
            else:
                self._take(await self._ask(AwaitReady(), _ADOPT_S))
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
            self._make_room()
            uid = self._own.stat().st_uid
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
            self._make_room()
            await self._clear()
            replace_file(self._directory / "boot", msgspec.json.encode(_BootRecord(boot.boots, boot.resumes)))
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
                self._take(await self._ask(AwaitReady(), _READY_S))
        except (SpvtpmError, TimeoutError) as error:
            await self.end()
            why = str(error) or f"it was not ready after {_READY_S:g} s"
            raise MachineFailed(f"the machine of VM {self._vm_id} did not come up: {why}{self._last_words()}") from None

    async def stop(self) -> None:
        """Powers it off in order; by force if it takes too long. Its memory is gone."""
        process = self._process
        if process is not None and self._state == "running":
            try:
                await self._ask(PowerOff(), _POWER_OFF_S)
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
        self._take(await self._ask(Suspend(), _SUSPEND_S))
        if self._state != "suspended" or not self.image.is_file():
            raise MachineFailed(f"the machine of VM {self._vm_id} was to be suspended, and is not")

    async def go_on(self) -> None:
        """Lets it run on.

        Raises:
            SpvtpmError: it cannot.
        """
        self._take(await self._ask(GoOn(), _SUSPEND_S))

    async def forget_image(self) -> None:
        """Removes the image, durably."""
        try:
            self.image.unlink(missing_ok=True)
            if self._own.is_dir():
                await asyncio.to_thread(sync_directory, self._own)
        except OSError as error:
            raise StorageError(f"cannot remove {self.image}: {error.strerror}") from None

    async def put_image(self, image: bytes) -> None:
        """Stores an image that was brought from elsewhere, durably.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self._make_room()
            await asyncio.to_thread(replace_file, self.image, image)
            os.chown(self.image, self._own.stat().st_uid, -1, follow_symlinks=False)
            await asyncio.to_thread(sync_directory, self._directory.parent)
        except OSError as error:
            raise StorageError(f"cannot write {self.image}: {error.strerror}") from None

    async def read_image(self) -> bytes:
        """The image.

        Raises:
            StorageError: there is none, or it is too long.
        """
        return await asyncio.to_thread(read_file, self.image, MAX_IMAGE_BYTES, private=False)

    async def remove(self) -> None:
        """Removes all that the host has of it.

        Raises:
            StorageError: something cannot be removed.
        """
        await asyncio.to_thread(remove_tree, self._directory)

    def console(self) -> Console:
        """Its console.

        Raises:
            WrongState: it does not run.
        """
        if self._state != "running" or self._process is None:
            raise WrongState(f"VM {self._vm_id} does not run, so there is nobody at its console")
        return Console(self._own / "console.sock", self._process.pid)

    def _make_room(self) -> None:
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._directory.chmod(0o711)  # whatever the umask took
        if not self._own.exists():
            new = self._own.with_name("machine.new")  # a machine's directory is its user's, or not there
            remove_tree(new)
            uid = self._users.next_uid()
            new.mkdir(mode=0o700)
            os.chown(new, uid, -1)
            new.rename(self._own)

    async def _clear(self) -> None:
        """Removes what a machine that is gone has left behind: sockets, and memory in clear. Its image stays."""
        self._has_remains = False
        if self._own.is_dir():
            await asyncio.to_thread(_clear_directory, self._own)

    def _spawn(self, boot: Boot, secret: Path) -> None:
        command = [sys.executable, "-m", "spvtpm.cli", "guest", "machine", str(self._own), "--vm", str(self._vm_id)]
        command += ["--secret", str(secret)]
        if boot.interface is not None:
            command += ["--interface", str(boot.interface)]
        if boot.resumes:
            command.append("--resume")
        with (self._directory / "log").open("wb") as sink:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                cwd=self._own,
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._own), "LANG": "C.UTF-8"},
                start_new_session=True,
                umask=0o077,
                **self._users.identity(self._own.stat().st_uid),
            )
        child.returncode = 0  # it is watched by its descriptor, and buried there
        self._watch(child.pid)
        self._state = "starting"

    def _watch(self, pid: int) -> None:
        self._process = MachineProcess(pid, self._ended, self._users.alone(self._own.stat().st_uid))

    def _ended(self) -> None:
        process = self._process
        if process is not None and process.ended.is_set():
            log.warning("VM %s: its machine, process %d, has ended%s", self._vm_id, process.pid, self._last_words())
            self._process, self._state, self._has_remains = None, "none", True
            self._on_end()

    async def _ask(self, request: ControlRequest, timeout_s: float) -> MachineIs:
        path = self._own / "control.sock"
        try:
            answer = await ask(path, "machine", encode_control(request), MAX_CONTROL_BYTES, timeout_s, self.pid)
        except NotRunning as error:  # which would be said of the secure processor
            raise MachineFailed(str(error)) from None
        reply = parse_control_reply(answer)
        if isinstance(reply, ErrorReply):
            raise error_from_code(reply.code, printable(reply.message))
        if reply.vm_id != self._vm_id:
            raise MessageError(f"the machine of VM {self._vm_id} says that it is that of VM {reply.vm_id}")
        return reply

    def _take(self, reply: MachineIs) -> None:
        states: dict[Literal["running", "suspended", "off"], MachineState] = {
            "running": "running",
            "suspended": "suspended",
        }
        if reply.state not in states:
            raise MachineFailed(f"the machine of VM {self._vm_id} is {reply.state}")
        self._state = states[reply.state]

    def _last_words(self) -> str:
        """The end of what it has said, for a sentence."""
        try:
            words = read_file(self._directory / "log", _MAX_LOG_BYTES)
        except StorageError:
            return ""
        lines = words.decode(errors="replace").strip().splitlines()
        return f" ({printable(lines[-1])[:512]})" if lines else ""


def _clear_directory(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name == "image":
            continue
        if path.is_dir() and not path.is_symlink():
            with suppress(StorageError):  # the machine that comes next says so
                remove_tree(path)
        else:
            path.unlink(missing_ok=True)
