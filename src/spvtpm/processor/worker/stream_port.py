"""A worker's data channel: plain commands on a byte stream, as QEMU sends them to a TPM emulator.

The stream has no frames. QEMU writes a command at once, and waits for its response before the next: so what is there is one
command, whatever size it announces.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from spvtpm.processor.worker.control import Control
from spvtpm.processor.worker.ports import plain_answer
from spvtpm.processor.worker.tpm import WorkerTpm
from spvtpm.processor.worker.tpm_commands import can_run_long, is_shutdown
from spvtpm.wire.tpm_stream import MAX_COMMAND_BYTES


class StreamPort:
    """The data channel. If the other side hangs up, or does not read, it is served no more.

    Args:
        descriptors: the socket, and one that cancels, or none; they stay the caller's.
        tpm: executes commands.
        control: the SP.
        has_shut_down: whether the guest's last command, before it was parked, was an orderly shutdown.
    """

    def __init__(self, descriptors: list[int], tpm: WorkerTpm, control: Control, *, has_shut_down: bool) -> None:
        self._tpm = tpm
        self._control = control
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._socket: socket.socket | None = None
        if descriptors:
            self._socket, self._canceller = (socket.socket(fileno=os.dup(descriptor)) for descriptor in descriptors)
            self._poll.register(self._socket, select.POLLIN)
        self.executed = 0
        self.guest_has_shut_down = has_shut_down

    def snapshot(self) -> None:
        return None

    def serve(self) -> None:
        control = self._control.fileno()
        while not self._control.pending():
            ready = {descriptor for descriptor, _event in self._poll.poll()}
            if control in ready:
                return
            try:
                self._serve_once()
            except OSError:  # its peer has gone, or does not read what it asks for
                self._hang_up()

    def _hang_up(self) -> None:
        assert self._socket is not None  # noqa: S101  # or nothing could have come
        self._poll.unregister(self._socket)
        self._socket.close()

    def _serve_once(self) -> None:
        """Takes and answers one command. What is no command, the TPM says so: whoever has sent it waits for an answer.

        Raises:
            OSError: the stream is of no more use.
        """
        assert self._socket is not None  # noqa: S101  # or nothing could have come
        command = self._socket.recv(MAX_COMMAND_BYTES + 1, socket.MSG_DONTWAIT)
        if not command:
            raise OSError("the other side has hung up")
        self.executed += 1
        response = self._execute(command)
        if self._socket.send(response, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) != len(response):
            raise OSError("the other side does not read")

    def _execute(self, command: bytes) -> bytes:
        self.guest_has_shut_down = is_shutdown(command)
        self._drain_canceller()  # of what came too late for the command before
        if not can_run_long(command):
            return plain_answer(self._tpm, command)
        with self._watch():
            return plain_answer(self._tpm, command)

    def _drain_canceller(self) -> None:
        with suppress(BlockingIOError):
            self._canceller.recv(MAX_COMMAND_BYTES, socket.MSG_DONTWAIT)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """While the body runs, the command is cancelled once the canceller says so."""
        finished = os.eventfd(0, os.EFD_CLOEXEC)
        thread = threading.Thread(target=self._wait_for_cancel, args=(finished,))
        thread.start()
        try:
            yield
        finally:
            os.eventfd_write(finished, 1)
            thread.join()
            os.close(finished)

    def _wait_for_cancel(self, finished: int) -> None:
        poll = select.poll()
        poll.register(finished, select.POLLIN)
        poll.register(self._canceller, select.POLLIN)
        timeout_ms = None
        while not any(descriptor == finished for descriptor, _event in poll.poll(timeout_ms)):
            self._tpm.cancel()
            self._drain_canceller()
            timeout_ms = 1  # libtpms forgets a cancel that comes before the command has begun: repeat it
