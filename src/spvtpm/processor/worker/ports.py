"""Where a worker's commands come from: the CRB interface in VM memory, or packets from an embedding process."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from mmap import mmap
from typing import Protocol

from spvtpm.processor.interfaces.direct import DirectInterface, TpmFailedError
from spvtpm.processor.worker.control import SecureProcessorGoneError
from spvtpm.processor.worker.messages import DirectPort, InterfaceSnapshot
from spvtpm.wire import crb
from spvtpm.wire.crb import AttachError
from spvtpm.wire.errors import StorageError
from spvtpm.wire.mailbox import MAX_PAYLOAD_BYTES

Execute = Callable[[bytes], bytes]

_TPM_RC_FAILURE = bytes.fromhex("80010000000a00000101")
"""Response TPM_RC_FAILURE. Source: TCG TPM 2.0 Library Part 2, table "TPM_RC constants"."""

_TPM_RC_COMMAND_SIZE = bytes.fromhex("80010000000a00000142")
_TPM_RC_NV_UNAVAILABLE = bytes.fromhex("80010000000a00000923")


class Port(Protocol):
    """One source of commands."""

    def fileno(self) -> int:
        """Readable when commands may wait."""

    def service(self) -> None:
        """Takes and answers what waits."""

    def snapshot(self) -> InterfaceSnapshot | None:
        """What must outlive parking."""

    def watch(self, cancel: Callable[[], None]) -> AbstractContextManager[None]:
        """A context in which a running command can be cancelled from outside."""


class CrbPort:
    """The direct path: shared memory and two doorbells."""

    def __init__(
        self,
        port: DirectPort,
        descriptors: list[int],
        execute: Execute,
        on_refused: Callable[[AttachError], None],
    ) -> None:
        memory, self._sp_doorbell, self._vm_doorbell = descriptors
        self._interface = DirectInterface(mmap(memory, crb.MEMORY_BYTES), port, execute, on_refused)
        os.close(memory)

    def fileno(self) -> int:
        return self._sp_doorbell

    def service(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._sp_doorbell)
        if self._interface.service():
            with suppress(BlockingIOError):  # a VM that filled its own counter is awake
                os.eventfd_write(self._vm_doorbell, 1)

    def snapshot(self) -> InterfaceSnapshot:
        return self._interface.snapshot()

    @contextmanager
    def watch(self, cancel: Callable[[], None]) -> Iterator[None]:
        """While the body runs, a VM that writes CTRL_CANCEL and rings has `cancel` called."""
        finished = os.eventfd(0, os.EFD_CLOEXEC)
        thread = threading.Thread(target=self._wait_for_cancel, args=(finished, cancel))
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
    """Plain commands, one a packet, from the process that embeds the vTPM and owns everything in it."""

    def __init__(self, descriptors: list[int], execute: Execute) -> None:
        (descriptor,) = descriptors
        self._socket = socket.socket(fileno=descriptor)
        self._execute = execute

    def fileno(self) -> int:
        return self._socket.fileno()

    def service(self) -> None:
        command = self._socket.recv(MAX_PAYLOAD_BYTES + 1)
        if not command:
            raise SecureProcessorGoneError
        self._socket.sendall(self._answer(command))

    def _answer(self, command: bytes) -> bytes:
        if len(command) > MAX_PAYLOAD_BYTES:
            return _TPM_RC_COMMAND_SIZE
        try:
            return self._execute(command)
        except StorageError:
            return _TPM_RC_NV_UNAVAILABLE
        except TpmFailedError:
            return _TPM_RC_FAILURE

    def snapshot(self) -> None:
        return None

    def watch(self, cancel: Callable[[], None]) -> AbstractContextManager[None]:  # noqa: ARG002  # packets have no cancel
        return nullcontext()
