"""The emulated VM: one process that stands for a virtual machine with its memory, its programs and its way to its vTPM.

In its directory:

    memory/          what is in the VM's memory: the directory of its programs
    tpm, tpm.ctrl    where TPM clients come in
    console.sock     where its owner's console comes in (`wire/console.py`)
    control.sock     where its hypervisor commands (`wire/machine_control.py`)
    image            its memory, sealed, once it is suspended, or as a stream from where it comes (`wire/memory_records.py`)
    copy             records of its memory, sealed, while it moves to another host (`memory_copy.py`)

It takes its key from the secure processor, and keeps it in this process's memory alone.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spvtpm.files import read_file, replace_file
from spvtpm.files.removal import remove_tree
from spvtpm.guest.commands import Commands
from spvtpm.guest.console_server import Console
from spvtpm.guest.launch_secret import take_launch_secret
from spvtpm.guest.machine_sockets import MachineSocket
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.guest.memory_copy import Copied, MemoryCopy
from spvtpm.guest.memory_image import open_image, pack, seal, unpack
from spvtpm.guest.own_process import adopt_orphans, protect_own_memory
from spvtpm.guest.vtpm_door import VtpmDoor
from spvtpm.wire.agent_api import MAX_IMAGE_BYTES
from spvtpm.wire.errors import InterfaceError, ResourceError, SpvtpmError, StorageError, WrongState
from spvtpm.wire.launch_secret import ComingMemory
from spvtpm.wire.machine_control import (
    AwaitReady,
    ControlRequest,
    CopyMemory,
    FinishCopy,
    GoOn,
    Halt,
    MachineState,
    MachineStateName,
    MemoryCopied,
    PowerOff,
)
from spvtpm.wire.memory_stream import open_stream

log = logging.getLogger(__name__)

_MAX_CONSOLES: Final = 16
_MAX_CONTROLS: Final = 8
_READY_S: Final = 120.0
_MAX_RINGS: Final = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine is, and what it begins with.

    Attributes:
        vm_id: of the VM.
        directory: the machine's own, absolute.
        secret: socket of the launch secret.
        interface: socket of the vTPM's interface; None: the VM has no vTPM.
        resumes: whether it goes on from its image.
    """

    vm_id: uuid.UUID
    directory: Path
    secret: Path
    interface: Path | None
    resumes: bool


class Machine:
    """A VM that runs. Life: construct → `run()`.

    Args:
        place: where it is.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._memory = place.directory / "memory"
        self._lock = threading.Lock()  # one change of state at a time
        self._state: MachineStateName = "off"
        self._settled = threading.Event()
        self._failure: SpvtpmError | None = None
        self._is_over = False
        self._news, self._bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # there is something to look at for `_watch`
        self._vm_key = b""
        self._door: VtpmDoor | None = None
        self._copy: MemoryCopy | None = None
        self._commands = Commands(self._memory, "")

    def run(self) -> None:
        """Boots, and runs until it is powered off, by its hypervisor or SIGTERM.

        Raises:
            SpvtpmError: it cannot boot, or has lost its vTPM.
        """
        protect_own_memory()
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._end())
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)  # for one that comes just before `_watch` waits
        control = MachineSocket(self._place.directory / "control.sock", _MAX_CONTROLS)
        console: MachineSocket | None = None
        try:
            control.serve_control(self._control)
            try:
                self._boot()
                console = MachineSocket(self._place.directory / "console.sock", _MAX_CONSOLES)
                console.serve(Console(self._vm_key, self._place.vm_id, self._commands).serve)
            except SpvtpmError as error:
                self._failure = error
                raise
            finally:
                self._settled.set()
            print("ready", flush=True)
            self._watch()
        finally:
            self._power_off()
            if console is not None:
                console.close()
            control.close()  # after the answer to PowerOff

    def _boot(self) -> None:
        place = self._place
        secret = take_launch_secret(place.secret)
        self._vm_key = secret.vm_key
        try:
            self._memory.mkdir(mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot make {self._memory}: {error.strerror}") from None
        if place.resumes:
            image = read_file(place.directory / "image", MAX_IMAGE_BYTES)
            unpack(self._open(image, secret.memory), self._memory)
        self._copy = MemoryCopy(self._vm_key, self._memory, place.directory / "copy")
        if place.interface is not None:
            self._door = VtpmDoor(place.interface, place.directory / "tpm", self._vm_key)
            self._door.open()
            self._commands = Commands(self._memory, self._door.tcti)
        self._state = "running"

    def _open(self, image: bytes, coming: ComingMemory | None) -> bytes:
        """Its memory, if it is of the kind that the secure processor says.

        Raises:
            ImageDamaged: it is not, or was altered.
        """
        if coming is not None:
            return open_stream(self._vm_key, coming.handoff_id, coming.stop_nonce, image)
        return open_image(self._vm_key, self._place.vm_id, image)

    def _end(self) -> None:
        self._is_over = True
        self._ring()

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it is full, and so will be read
            os.write(self._bell, b"\0")

    def _watch(self) -> None:
        """Returns when it is to end.

        Raises:
            InterfaceError: the vTPM has gone.
        """
        while not self._is_over:
            poll = select.poll()
            poll.register(self._news, select.POLLIN)
            with self._lock:
                memory = self._interface
                if memory is not None:
                    poll.register(memory.connection, select.POLLIN)  # it says nothing but that it is over
            ready = {descriptor for descriptor, _event in poll.poll()}
            if self._news in ready:
                os.read(self._news, _MAX_RINGS)
                self._commands.bury_orphans()
            with self._lock:
                if ready - {self._news} and memory is self._interface:
                    raise InterfaceError("the secure processor has taken the vTPM's interface away")

    @property
    def _interface(self) -> InterfaceMemory | None:
        return self._door.memory if self._door is not None else None

    def _control(self, request: ControlRequest) -> MachineState | MemoryCopied:
        if not self._settled.wait(_READY_S):
            raise ResourceError("the machine is still booting")
        if self._failure is not None:
            raise self._failure
        with self._lock:
            match request:
                case AwaitReady():
                    pass
                case PowerOff():
                    self._end()
                    return MachineState(vm_id=self._place.vm_id, state="off")
                case GoOn():
                    self._go_on()
                case Halt():
                    self._halt()
                case CopyMemory() | FinishCopy():
                    copied = self._copied(request)
                    return MemoryCopied(vm_id=self._place.vm_id, records=copied.records, bytes=copied.bytes)
                case _:
                    self._suspend()
        return MachineState(vm_id=self._place.vm_id, state=self._state)

    def _suspend(self) -> None:
        if self._state == "suspended":
            return
        self._require("running")
        self._state = "suspended"
        try:
            self._commands.end_all()
            if self._door is not None:
                self._door.close()
            image = seal(self._vm_key, self._place.vm_id, pack(self._memory))
            replace_file(self._place.directory / "image", image)
        except SpvtpmError:
            self._go_on()
            raise

    def _halt(self) -> None:
        if self._state == "halted":
            return
        self._require("running")
        self._state = "halted"
        try:
            self._commands.halt()
            if self._door is not None:
                self._door.close()
        except SpvtpmError:
            self._go_on()
            raise

    def _copied(self, request: CopyMemory | FinishCopy) -> Copied:
        assert self._copy is not None  # noqa: S101  # it has booted
        if isinstance(request, FinishCopy):
            self._require("halted")
            return self._copy.finish(request.handoff_id, request.stop_nonce)
        self._require("running", "halted")
        return self._copy.round(request.handoff_id)

    def _require(self, *states: MachineStateName) -> None:
        if self._state not in states:
            raise WrongState(f"the machine is {self._state}")

    def _go_on(self) -> None:
        if self._state not in ("suspended", "halted"):
            return
        if self._door is not None and self._interface is None:
            self._door.open()
            self._ring()
        self._commands.go_on()
        self._state = "running"

    def _power_off(self) -> None:
        with self._lock:
            self._state = "off"
            try:
                self._commands.end_all()
            except ResourceError as error:
                log.error("%s", error)
            if self._door is not None:
                self._door.close()
            if self._copy is not None:
                self._copy.discard()
            try:
                remove_tree(self._memory)
            except StorageError as error:
                log.error("%s", error)
