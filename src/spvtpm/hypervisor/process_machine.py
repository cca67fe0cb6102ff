"""What machines have in common that are a process each, whatever runs in it: its directory, its user, its end."""

from __future__ import annotations

import logging
import os
import subprocess
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from spvtpm.hypervisor.machine_directory import MachineDirectory
from spvtpm.hypervisor.machine_process import MachineProcess
from spvtpm.hypervisor.virtual_machine import MachineState
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import SpvtpmError, StorageError

log = logging.getLogger(__name__)


class ProcessMachine:
    """A VM's machine that is a process. The part of `VirtualMachine` that does not depend on its kind.

    A machine has a session of its own, and outlives the agent.

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

    @property
    def by_emulator(self) -> bool:
        """Whether its boots reach the vTPM by the TPM emulator interface."""
        return False

    async def adopt(self) -> None:
        """Takes over a machine that an agent which has died had started; one that does not answer is ended."""
        left, self._left = self._left, None
        if left is None:
            await self._clear()
            return
        try:
            self._watch(left)
            self._boots = self._directory.boots()
            await self._find_state()
            log.info("VM %s: its machine, process %d, goes on", self._vm_id, left)
        except (SpvtpmError, OSError, *UNDECODABLE) as error:
            log.warning("VM %s: its machine is of no use and ended: %s", self._vm_id, error)
            await self.end()

    async def _find_state(self) -> None:
        """Has `state` tell what an adopted machine does.

        Raises:
            SpvtpmError, OSError, msgspec's errors: it is of no use.
        """
        raise NotImplementedError

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

    async def forget_image(self) -> None:
        """Removes the image, durably."""
        await self._directory.forget_image()

    async def remove(self) -> None:
        """Removes all that the host has of it.

        Raises:
            StorageError: something cannot be removed.
        """
        await self._directory.remove()

    async def _clear(self) -> None:
        self._has_remains = False
        await self._directory.clear()

    def _spawn(self, command: Sequence[str]) -> None:
        """Begins the process.

        Raises:
            OSError: it cannot be begun.
        """
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


def make_directory(directory: Path) -> None:
    """Makes the directory of all VMs, if it is not there.

    Raises:
        StorageError: it cannot be used.
    """
    try:
        directory.mkdir(mode=0o711, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {directory}: {error.strerror}") from None


def vms_in(directory: Path) -> set[uuid.UUID]:
    """The VMs that have something in the directory of all VMs."""
    found = set()
    for path in directory.iterdir():
        try:
            found.add(uuid.UUID(path.name))
        except ValueError:
            log.warning("%s is no VM's", path)
    return found
