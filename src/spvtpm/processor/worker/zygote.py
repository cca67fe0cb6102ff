"""The zygote: a process that has everything loaded, holds no secret, and forks workers in milliseconds.

Started by executing Python anew, so nothing of the SP's memory is in it. It enters its namespaces once; every worker is
born in them and confines itself further. It is the first process of its own PID namespace where the kernel gives one:
if it dies, the kernel kills all workers.

Messages on its socket (SOCK_SEQPACKET): `F` + tag with one descriptor asks for a worker that talks over it, `B` for one that
manufactures a blank TPM with its EKs while it waits; `K` + tag kills one; the zygote answers `X` + tag + wait status when a
worker has ended, and `R` + text once it is ready. A tag is 32 bits.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

from spvtpm.engine.libtpms import Engine
from spvtpm.processor.interfaces import direct
from spvtpm.processor.worker import worker
from spvtpm.processor.worker.rehearsal import rehearse
from spvtpm.processor.worker.sandbox import Sandbox, enter_namespaces
from spvtpm.wire.ek_templates import EK_TEMPLATES

FORK = b"F"
FORK_BLANK = b"B"
KILL = b"K"
EXITED = b"X"
READY = b"R"
TAG = struct.Struct(">cI")
EXIT = struct.Struct(">cIi")
MAX_MESSAGE_BYTES = 4096


class Zygote:
    """Forks a worker per request, reports each one's end, and ends when the SP does.

    Args:
        link: SOCK_SEQPACKET socket to the SP.
        sandbox: made ready while files could still be read.
        missing: namespaces that the kernel does not give.
    """

    def __init__(self, link: socket.socket, sandbox: Sandbox, missing: list[str]) -> None:
        self._link = link
        self._sandbox = sandbox
        self._missing = missing
        self._tags: dict[int, int] = {}
        self._wakeup, self._child_ended = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._child_ended, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def run(self) -> None:
        """Serves until the SP's end of the link closes."""
        gc.collect()
        gc.freeze()
        self._link.send(READY + "\n".join(self._missing).encode()[: MAX_MESSAGE_BYTES - 1])
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _event in poll.poll()}
            if self._wakeup in ready:
                self._reap()
            if self._link.fileno() in ready and not self._serve():
                return

    def _serve(self) -> bool:
        message, descriptors, _flags, _address = socket.recv_fds(self._link, MAX_MESSAGE_BYTES, 1)
        if not message:
            return False
        kind, tag = TAG.unpack(message)
        if kind in (FORK, FORK_BLANK):
            self._fork(tag, descriptors[0], blank=kind == FORK_BLANK)
        elif kind == KILL:
            for pid in [pid for pid, known in self._tags.items() if known == tag]:
                os.kill(pid, signal.SIGKILL)
        return True

    def _fork(self, tag: int, descriptor: int, *, blank: bool) -> None:
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._become_worker(zygote, descriptor, blank=blank)
                status = 0
            finally:
                os._exit(status)
        os.close(descriptor)
        self._tags[pid] = tag

    def _become_worker(self, zygote: int, descriptor: int, *, blank: bool) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._wakeup)
        os.close(self._child_ended)
        self._link.close()
        missing = self._missing + self._sandbox.confine(expected_parent=zygote)
        worker.run(socket.socket(fileno=descriptor), missing, blank=EK_TEMPLATES if blank else None)

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wakeup, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (tag := self._tags.pop(pid, None)) is not None:
                # An SP that does not listen loses the report, not its zygote.
                with suppress(BlockingIOError):
                    self._link.send(EXIT.pack(EXITED, tag, os.waitstatus_to_exitcode(status)), socket.MSG_DONTWAIT)


def main() -> None:
    """`python -m spvtpm.processor.worker.zygote DESCRIPTOR`, executed by the SP only."""
    link = socket.socket(fileno=int(sys.argv[1]))
    Engine.warm_up()
    direct.warm_up()
    rehearse()
    sandbox = Sandbox.prepare()
    missing = enter_namespaces()
    # The new PID namespace begins with the next child: it becomes the zygote, this process only waits for its end.
    pid = os.fork()
    if pid:
        link.close()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    with suppress(KeyboardInterrupt):
        Zygote(link, sandbox, missing).run()


if __name__ == "__main__":
    main()
