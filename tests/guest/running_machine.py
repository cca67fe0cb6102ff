"""An emulated VM in a process of its own over a real secure processor, and those who use it: its hypervisor and its owner."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from spvtpm.terminal.console import run_command
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire import messages
from spvtpm.wire.errors import error_from_code
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.launch_secret import ComingMemory
from spvtpm.wire.machine_control import (
    MAX_CONTROL_BYTES,
    AwaitReady,
    ControlRequest,
    CopyMemory,
    FinishCopy,
    GoOn,
    Halt,
    MachineState,
    MemoryCopied,
    PowerOff,
    Suspend,
    encode_control,
    parse_control_reply,
)
from spvtpm.wire.memory_records import split_records
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.owner_messages import MyVm
from tests.guest.bound_secret import bound_secret
from tests.harness import RunningSp

PATIENCE_S = 60.0


class RunningMachine:
    """A machine; does the agent's part too. Life: construct → `begin` or `resume` → … → `kill`.

    Args:
        sp: of its host.
        with_vtpm: whether the VM has one.
        uid: user id of its process; None: as this process.
    """

    def __init__(self, sp: RunningSp, *, with_vtpm: bool = True, uid: int | None = None) -> None:
        self.sp = sp
        self.vm_id = uuid.uuid4()
        self.directory = sp.state.with_name(f"m-{self.vm_id.hex[:8]}")
        self.directory.mkdir(mode=0o700)
        self.log_path = self.directory.with_suffix(".log")
        self._with_vtpm = with_vtpm
        self._uid = uid
        if uid is not None:
            os.chown(self.directory, uid, uid)
        self.process: subprocess.Popen[bytes] | None = None
        with sp.channel() as channel:
            channel.ask(sp.owner.provision(self.vm_id, self.key, inject_key=True), MyVm)

    @property
    def key(self) -> bytes:
        """The VM key."""
        return self.sp.key(self.vm_id)

    @property
    def image(self) -> Path:
        """Its memory, once it is suspended."""
        return self.directory / "image"

    @property
    def memory(self) -> Path:
        """What is in its memory."""
        return self.directory / "memory"

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self.process is not None
        return self.process.pid

    def begin(self) -> None:
        """The first boot, or another one."""
        info = self.sp.vm(self.vm_id)
        if info.boots:
            info = self.sp.info(messages.StartVm(vm_id=self.vm_id, vm_uid=self._uid))
        else:
            info = self.sp.info(messages.LaunchVm(vm_id=self.vm_id, with_vtpm=self._with_vtpm, vm_uid=self._uid))
        self.spawn(info)
        self.await_ready()

    def resume(self, memory: ComingMemory | None = None) -> None:
        """Goes on from the image, in the boot in which it was hibernated; or from memory that has come from elsewhere."""
        info = self.sp.info(messages.StartVm(vm_id=self.vm_id, vm_uid=self._uid))
        if memory is not None:
            assert info.launch_secret
            bound = bound_secret(Path(info.launch_secret), self.log_path.with_suffix(".sock"), memory)
            info = msgspec.structs.replace(info, launch_secret=str(bound))
        self.spawn(info, "--resume")
        self.await_ready()

    def spawn(self, info: messages.VmInfo, *options: str) -> None:
        """Starts the process alone."""
        command = [sys.executable, "-m", "spvtpm.cli", "guest", "machine", str(self.directory), "--vm", str(self.vm_id)]
        command += ["--secret", str(info.launch_secret or self.sp.state / "run" / f"{self.vm_id}.secret.sock")]
        if info.vtpm is not None:
            command += ["--interface", info.vtpm.interface]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                umask=0o077,
                user=self._uid,
                group=self._uid,
                extra_groups=None if self._uid is None else [],
            )

    def await_ready(self) -> None:
        """Until it says so."""
        assert self.process is not None and self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            raise AssertionError(f"the machine did not come up:\n{self.log()}")

    def log(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text()

    def ask(self, request: ControlRequest | bytes) -> MachineState:
        """One request of the hypervisor; a refusal is raised."""
        reply = self._exchange(request)
        assert isinstance(reply, MachineState)
        return reply

    def copy(self, request: CopyMemory | FinishCopy) -> list[bytes]:
        """The records that it writes."""
        reply = self._exchange(request)
        assert isinstance(reply, MemoryCopied)
        written = (self.directory / "copy").read_bytes()
        records = [record.data for record in split_records(written)]
        assert (reply.records, reply.bytes) == (len(records), len(written))
        return records

    def _exchange(self, request: ControlRequest | bytes) -> MachineState | MemoryCopied:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(self.directory / "control.sock"))
            connection.sendall(encode_frame(request if isinstance(request, bytes) else encode_control(request)))
            decoder, frames = FrameDecoder(MAX_CONTROL_BYTES), list[bytes]()
            while not frames:
                data = connection.recv(4096)
                if not data:
                    raise ConnectionResetError
                frames = decoder.feed(data)
        reply = parse_control_reply(frames[0])
        if isinstance(reply, ErrorReply):
            raise error_from_code(reply.code, reply.message)
        assert reply.vm_id == self.vm_id
        return reply

    def state(self) -> str:
        """As it says."""
        return self.ask(AwaitReady()).state

    def suspend(self) -> None:
        """Its memory is in its image."""
        assert self.ask(Suspend()).state == "suspended"

    def halt(self) -> None:
        """Nothing runs in it any more."""
        assert self.ask(Halt()).state == "halted"

    def go_on(self) -> None:
        """It runs on."""
        assert self.ask(GoOn()).state == "running"

    def power_off(self) -> None:
        """In order."""
        assert self.ask(PowerOff()).state == "off"
        assert self.wait() == 0, self.log()

    def hibernate(self) -> None:
        """Machine and vTPM; what is left is ciphertext."""
        self.suspend()
        self.sp.info(messages.HibernateVm(vm_id=self.vm_id))
        self.kill()

    def wait(self) -> int:
        """Until it ends; its exit code."""
        assert self.process is not None and self.process.stdout is not None
        code = self.process.wait(PATIENCE_S)
        self.process.stdout.close()
        self.process = None
        return code

    def kill(self) -> None:
        """Ends it at once, as the agent does, and clears away what it has had in clear."""
        if self.process is not None:
            self.process.kill()
            self.wait()
        for path in self.directory.iterdir():
            if path.is_dir():
                subprocess.run(["rm", "-rf", path], check=True)
            elif path != self.image:
                path.unlink()

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def run(self, *arguments: str, given: bytes | None = None, key: bytes | None = None) -> tuple[int, bytes, bytes]:
        """A command on the console: its exit code, and what it wrote on stdout and stderr."""
        written: dict[str, bytes] = {"stdout": b"", "stderr": b""}

        def take(stream: str, data: bytes) -> None:
            written[stream] += data

        way = through_socket(self.directory / "console.sock")
        with Pipe(given) as pipe:
            code = run_command(way, key or self.key, self.vm_id, arguments, take, pipe.descriptor, PATIENCE_S)
        return code, written["stdout"], written["stderr"]

    def shell(self, script: str) -> bytes:
        """What a script that has to succeed prints."""
        code, out, err = self.run("sh", "-c", script)
        assert code == 0, (out, err)
        return out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class Pipe:
    """Something to read, for a command.

    Args:
        content: not longer than a pipe holds; None: there is nothing to read from.
    """

    def __init__(self, content: bytes | None) -> None:
        self.descriptor: int | None = None
        if content is not None:
            self.descriptor = os.memfd_create("input", os.MFD_CLOEXEC)
            os.write(self.descriptor, content)
            os.lseek(self.descriptor, 0, os.SEEK_SET)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def ended(pids: Sequence[int]) -> bool:
    """Waits for the end of processes that are no children of this one."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(PATIENCE_S * 1000):
                return False
        finally:
            os.close(descriptor)
    return True
