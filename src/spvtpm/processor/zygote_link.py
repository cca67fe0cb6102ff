"""The SP's end of the zygote: start it, have workers forked, hear of their ends. No event loop; callers wait as they like."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from contextlib import suppress
from typing import NamedTuple

from spvtpm.processor.worker.zygote import EXIT, EXITED, FORK, FORK_BLANK, KILL, MAX_MESSAGE_BYTES, READY, TAG
from spvtpm.wire.errors import WorkerError

_PATIENCE_MS = 1000


class WorkerExit(NamedTuple):
    """A worker has ended.

    Attributes:
        tag: the worker's number.
        exit_code: its exit code; negative: the signal that killed it.
    """

    tag: int
    exit_code: int


class ZygoteLink:
    """One zygote process and its socket.

    Attributes:
        missing: sentences naming each namespace that this kernel does not give; known once `wait_ready` returned.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        command = [sys.executable, "-I", "-m", "spvtpm.processor.worker.zygote", str(theirs.fileno())]
        # A session of its own: Ctrl-C in a terminal ends the SP in order, and the SP its workers.
        # No environment and no output: nothing of the SP's leaks in, nothing a worker writes leaks out.
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        theirs.close()
        self._socket = ours
        self._next_tag = 0

    def wait_ready(self) -> None:
        """Waits until workers can be forked.

        Raises:
            WorkerError: the zygote died at start.
        """
        message = self._socket.recv(MAX_MESSAGE_BYTES)
        if message[:1] != READY:
            raise WorkerError(f"the worker zygote did not start (exit code {self._process.wait()})")
        self.missing = message[1:].decode().splitlines()

    def fileno(self) -> int:
        """Readable when a worker has ended, or the zygote itself."""
        return self._socket.fileno()

    def fork(self, *, blank: bool = False) -> tuple[int, socket.socket]:
        """A new worker, confined and waiting for its `Start`: its tag and this side of its control socket.

        Args:
            blank: it manufactures a TPM while it waits.

        Raises:
            WorkerError: the zygote is gone.
        """
        self._next_tag = (self._next_tag + 1) % (1 << 32)
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise WorkerError(f"no socket can be had for a worker: {error.strerror}") from None
        with theirs:
            try:
                socket.send_fds(
                    self._socket, [TAG.pack(FORK_BLANK if blank else FORK, self._next_tag)], [theirs.fileno()]
                )
            except OSError:
                ours.close()
                raise WorkerError("the worker zygote is gone") from None
        return self._next_tag, ours

    def kill(self, tag: int) -> None:
        """Kills a worker; nothing happens if it has ended."""
        try:
            self._socket.send(TAG.pack(KILL, tag))
        except BlockingIOError:  # it has more to do than it can take in
            poll = select.poll()
            poll.register(self._socket, select.POLLOUT)
            poll.poll(_PATIENCE_MS)
            with suppress(OSError):
                self._socket.send(TAG.pack(KILL, tag))
        except OSError:
            return  # the zygote is gone, and with it all workers

    def receive_exit(self) -> WorkerExit | None:
        """The next worker that has ended; None when the zygote has.

        Raises:
            BlockingIOError: none yet, on a non-blocking link.
        """
        message = self._socket.recv(MAX_MESSAGE_BYTES)
        if len(message) != EXIT.size:
            return None
        kind, tag, exit_code = EXIT.unpack(message)
        return WorkerExit(tag, exit_code) if kind == EXITED else None

    def set_blocking(self, blocking: bool) -> None:
        """As `socket.setblocking`."""
        self._socket.setblocking(blocking)

    def close(self) -> None:
        """Ends the zygote and with it every worker that is left."""
        self._socket.close()
        self._process.wait()
