"""Where a worker's commands come from: the CRB interface in VM memory, or packets from an embedding process."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from mmap import mmap
from typing import Protocol

from spvtpm.processor.interfaces.direct import DirectEvent, DirectInterface, TpmFailedError
from spvtpm.processor.worker.control import Control, SecureProcessorGoneError
from spvtpm.processor.worker.messages import DirectPort, InterfaceSnapshot, Refused
from spvtpm.processor.worker.tpm import WorkerTpm
from spvtpm.wire import crb
from spvtpm.wire.crb import AttachError
from spvtpm.wire.errors import StorageError
from spvtpm.wire.mailbox import MAX_PAYLOAD_BYTES

_TPM_RC_COMMAND_SIZE = bytes.fromhex("80010000000a00000142")
"""Response TPM_RC_COMMAND_SIZE. Source: TCG TPM 2.0 Library Part 2, table "TPM_RC constants"."""

_TPM_RC_FAILURE = bytes.fromhex("80010000000a00000101")
_TPM_RC_NV_UNAVAILABLE = bytes.fromhex("80010000000a00000923")


class Port(Protocol):
    """One source of commands."""

    @property
    def executed(self) -> int:
        """How many commands came so far."""

    @property
    def guest_has_shut_down(self) -> bool:
        """Whether the last command was an orderly shutdown."""

    def serve(self) -> None:
        """Takes and answers commands until the SP has something to say."""

    def snapshot(self) -> InterfaceSnapshot | None:
        """What must outlive parking."""


def plain_answer(tpm: WorkerTpm, command: bytes) -> bytes:
    """The response to a command of a port whose only way to tell an error is a response."""
    if len(command) > MAX_PAYLOAD_BYTES:
        return _TPM_RC_COMMAND_SIZE
    try:
        return tpm.execute(command)
    except StorageError:
        return _TPM_RC_NV_UNAVAILABLE
    except TpmFailedError:
        return _TPM_RC_FAILURE


class CrbPort:
    """The direct path: shared memory and two doorbells.

    Args:
        port: whom it serves.
        descriptors: memory, SP doorbell, VM doorbell; they stay the caller's.
        tpm: executes commands.
        control: the SP.
    """

    guest_has_shut_down = False  # compiled code has executed it: not known

    def __init__(self, port: DirectPort, descriptors: list[int], tpm: WorkerTpm, control: Control) -> None:
        memory, self._sp_doorbell, vm_doorbell = descriptors
        doorbells = self._sp_doorbell, vm_doorbell
        self._interface = DirectInterface(mmap(memory, crb.MEMORY_BYTES), doorbells, port, tpm.access)
        self._tpm = tpm
        self._control = control

    @property
    def executed(self) -> int:
        return self._interface.executed

    def snapshot(self) -> InterfaceSnapshot:
        return self._interface.snapshot()

    def serve(self) -> None:
        control = self._control.fileno()
        while not self._control.pending():
            event = self._interface.serve(control, hold=self._tpm.waits_for_storage)
            if event is DirectEvent.CONTROL:
                return
            if self._handle(event):
                self._control.send(Refused(self._interface.error, self._interface.refused))

    def _handle(self, event: DirectEvent) -> bool:
        """Ends the command under way; returns whether the number of refusals is worth telling."""
        interface = self._interface
        try:
            if event is DirectEvent.REFUSED:
                return True
            if event is DirectEvent.STORED:
                self._tpm.make_durable()
                return interface.answer(interface.response)
            if event is DirectEvent.COMMAND:
                with self._watch():
                    response = self._tpm.execute(interface.command)
                return interface.answer(response)
        except StorageError:
            return interface.refuse(AttachError.STORAGE)
        except TpmFailedError:
            pass
        return interface.refuse(AttachError.TPM_FAILED)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """While the body runs, a VM that writes CTRL_CANCEL and rings has the command cancelled."""
        finished = os.eventfd(0, os.EFD_CLOEXEC)
        thread = threading.Thread(target=self._wait_for_cancel, args=(finished, self._tpm.cancel))
        thread.start()
        try:
            yield
        finally:
            os.eventfd_write(finished, 1)
            thread.join()
            os.close(finished)
            # The thread may have taken rings that were about other registers: have them looked at again.
            with suppress(BlockingIOError):
                os.eventfd_write(self._sp_doorbell, 1)

    def _wait_for_cancel(self, finished: int, cancel: Callable[[], None]) -> None:
        poll = select.poll()
        poll.register(finished, select.POLLIN)
        poll.register(self._sp_doorbell, select.POLLIN)
        timeout_ms = None
        while not any(descriptor == finished for descriptor, _event in poll.poll(timeout_ms)):
            with suppress(BlockingIOError):
                os.eventfd_read(self._sp_doorbell)
            if self._interface.cancel_requested():
                cancel()
                timeout_ms = 1  # libtpms forgets a cancel that comes before the command has begun: repeat it


class PacketPort:
    """Plain commands, one a packet, from the process that embeds the vTPM and owns everything in it.

    Args:
        descriptors: the socket; it stays the caller's.
        tpm: executes commands.
        control: the storage of the embedding process.
    """

    guest_has_shut_down = False  # its user has the whole TPM, and ends it in order himself

    def __init__(self, descriptors: list[int], tpm: WorkerTpm, control: Control) -> None:
        (descriptor,) = descriptors
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._tpm = tpm
        self._control = control
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(control, select.POLLIN)
        self.executed = 0

    def serve(self) -> None:
        control = self._control.fileno()
        while not self._control.pending():
            ready = {descriptor for descriptor, _event in self._poll.poll()}
            if control in ready:
                return
            command = self._socket.recv(MAX_PAYLOAD_BYTES + 1)
            if not command:
                raise SecureProcessorGoneError
            self.executed += 1
            self._socket.sendall(plain_answer(self._tpm, command))

    def snapshot(self) -> None:
        return None
