"""The demo's hypervisor as an attacker: it reads, searches and overwrites the memory of a VM's vTPM; and a plain vTPM beside."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Self

from spvtpm.demo.cloud_vm import CloudVm
from spvtpm.demo.stage import PATIENCE_S, ActFailed, Outcome, SecureProcessorHost, run_tool
from spvtpm.demo.story import Story
from spvtpm.embedded import VTPM
from spvtpm.files import create_file
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.guest.tcti import TctiServer, listen_unix
from spvtpm.wire import crb, mailbox
from spvtpm.wire.crb import AttachError, CtrlReq, CtrlSts, Register
from spvtpm.wire.errors import MailboxError
from spvtpm.wire.mailbox import Direction

_ON_ITS_WAY_S = 1.0
"""Until a client that was started waits at the interface; nobody tells."""


def _frame_in(memory: bytes) -> tuple[int, bytes]:
    """Sequence and bytes of the command frame in a copy of the memory."""
    copy = memory[crb.COMMAND_ADDRESS : crb.COMMAND_ADDRESS + mailbox.MAX_FRAME_BYTES]
    header = mailbox.parse_header(copy, Direction.COMMAND)
    return header.sequence, copy[: mailbox.OVERHEAD_BYTES + header.payload_bytes]


@dataclass(slots=True)
class Watch:
    """What the host found in the VM's memory while a command ran.

    Attributes:
        looks: how often it searched all of the memory.
        frames: the command frames that it saw, by sequence.
        found: the plain texts that it found.
    """

    looks: int = 0
    frames: dict[int, bytes] = field(default_factory=dict)
    found: set[bytes] = field(default_factory=set)


class HostView:
    """What the host's owner has of a VM's interface: the memory and the doorbell. He has no key.

    He takes the descriptors from the interface's socket as QEMU does, to map the memory into the VM, and keeps a copy.

    Args:
        interface: the interface's socket; free.
    """

    def __init__(self, interface: Path) -> None:
        with InterfaceMemory.connect(interface) as offered:
            self._memory_file = os.dup(offered.descriptors.memory)
            self._doorbell = os.dup(offered.descriptors.sp_doorbell)
        self._memory = mmap(self._memory_file, crb.MEMORY_BYTES)

    @classmethod
    def on_the_way(cls, host: SecureProcessorHost, vm_id: uuid.UUID) -> Self:
        """Takes it between two boots: the hypervisor kills the VM's machine, and stands in the way before the next one.

        Raises:
            ActFailed: the VM has no machine.
        """
        with ThreadPoolExecutor(1) as waiting:  # whoever waits at the interface gets it next
            view = waiting.submit(cls, host.interface(vm_id))
            pid = host.machine_pid(vm_id)
            if pid is None:
                raise ActFailed("VM A has no machine")
            time.sleep(_ON_ITS_WAY_S)
            os.kill(pid, signal.SIGKILL)
            return view.result(PATIENCE_S)

    def command_frame(self) -> bytes:
        """The command frame that lies in the memory, as it is: a clear header, ciphertext, a tag.

        Raises:
            MailboxError: none lies there.
        """
        return _frame_in(self._memory[:])[1]

    @contextmanager
    def watch(self, *plaintexts: bytes) -> Iterator[Watch]:
        """Searches the whole memory, over and over, while the body runs."""
        watch, stop = Watch(), threading.Event()

        def look() -> None:
            while not stop.is_set():
                self._look(watch, plaintexts)
                time.sleep(0.0001)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            stop.set()
            thread.join()
        self._look(watch, plaintexts)

    def _look(self, watch: Watch, plaintexts: tuple[bytes, ...]) -> None:
        copy = self._memory[:]
        watch.looks += 1
        watch.found.update(text for text in plaintexts if text in copy)
        with suppress(MailboxError):  # none yet
            sequence, frame = _frame_in(copy)
            watch.frames[sequence] = frame

    def start(self, frame: bytes) -> AttachError:
        """Writes a frame over the VM's, rings the doorbell, and waits for what the SP makes of it.

        Returns:
            The SP's verdict; `NONE` would mean that it was executed.
        """
        self._memory[crb.COMMAND_ADDRESS : crb.COMMAND_ADDRESS + len(frame)] = frame
        crb.REQ_TO_START.pack_into(self._memory, Register.CTRL_REQ, CtrlReq.CMD_READY, 0, 0, crb.START)
        os.eventfd_write(self._doorbell, 1)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            _request, status, _cancel, start = crb.REQ_TO_START.unpack_from(self._memory, Register.CTRL_REQ)
            if start == 0:
                if not status & CtrlSts.TPM_STS:
                    return AttachError.NONE
                return AttachError(crb.U32.unpack_from(self._memory, crb.ATTACH_ERROR_OFFSET)[0])
            time.sleep(0.001)
        raise ActFailed("the secure processor did not take the frame")

    def close(self) -> None:
        """Forgets the memory."""
        self._memory.close()
        os.close(self._memory_file)
        os.close(self._doorbell)


class PlainVtpm:
    """The contrast: a vTPM whose commands pass the host in clear, over a socket, and a host that copies them.

    Args:
        directory: for its socket; made here.
        story: where commands are shown.
    """

    def __init__(self, directory: Path, story: Story) -> None:
        directory.mkdir(mode=0o700)
        self.copied: list[bytes] = []
        self._directory = directory
        self._story = story
        self._tpm = VTPM()
        self._server = TctiServer(self._copy_and_transmit, lambda: None, *listen_unix(directory / "tpm"))
        self._server.start()

    def _copy_and_transmit(self, command: bytes) -> bytes:
        response = self._tpm.transmit(command)
        self.copied += [command, response]
        return response

    def run(self, *words: str) -> bytes:
        """Runs a tool that must succeed.

        Raises:
            ActFailed: it did not.
        """
        self._story.command("plain$", words)
        tcti = {"TPM2TOOLS_TCTI": f"swtpm:path={self._directory / 'tpm'}"}
        outcome = run_tool(list(words), self._directory, tcti)
        if not outcome.ok:
            raise ActFailed(f"{words[0]} on the plain vTPM: {outcome.complaint}")
        return outcome.output

    def write(self, name: str, content: bytes) -> None:
        """Puts a file where its tools run."""
        (self._directory / name).write_bytes(content)

    def replay(self, command: bytes) -> None:
        """Sends a copied command again."""
        self._tpm.transmit(command)

    def close(self) -> None:
        """Ends it."""
        self._server.close()
        self._tpm.close()


def borrow_interface(vm: CloudVm, other: CloudVm, host: SecureProcessorHost, directory: Path) -> Outcome:
    """What VM A's tools get from VM B's interface: with VM A's key, over the `cmd` TCTI. VM B's machine has to go for it."""
    key = directory / "vm-a.key"
    create_file(key, vm.key)
    pid = host.machine_pid(other.vm_id)
    if pid is None:
        raise ActFailed("VM B has no machine")
    command = f"exec {sys.executable} -m spvtpm.cli guest tcti --interface {host.interface(other.vm_id)} --key {key}"
    shown = f'TPM2TOOLS_TCTI="cmd:spvtpm guest tcti --interface={other.name}.sock --key={vm.name}.key"'
    vm.story.output([shown], style="bold")
    vm.story.command(f"{vm.name}$", ["tpm2_getrandom", "--hex", "8"])
    with ThreadPoolExecutor(1) as tool:  # it waits at the interface
        outcome = tool.submit(
            run_tool, ["tpm2_getrandom", "--hex", "8"], directory, {"TPM2TOOLS_TCTI": f"cmd:{command}"}
        )
        time.sleep(_ON_ITS_WAY_S)
        os.kill(pid, signal.SIGKILL)
        return outcome.result(PATIENCE_S)
