"""Other processes, for tests: which there are below one, and their ends, awaited without guessing how long they take.

And a disk that is full for one of them.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spvtpm.wire import crb
from tests.harness import RunningSp


def descendants(pid: int) -> list[int]:
    """Process ids of all processes below one."""
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it may end while it is looked at
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def worker_of(daemon: int, memory: int) -> int:
    """The process below `daemon` that maps an interface's memory file."""
    inode = str(os.fstat(memory).st_ino)
    for pid in descendants(daemon):
        with suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if line.split()[4] == inode and "/memfd:spvtpm-crb" in line:
                    return pid
    raise AssertionError("no process maps that memory")


def wait_until(condition: Callable[[], bool]) -> None:
    """For what nobody announces."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class Doomed:
    """A process that is to end. Opened while it lives, so that its end can be awaited.

    Args:
        pid: its id.
    """

    def __init__(self, pid: int) -> None:
        self._descriptor = os.pidfd_open(pid)

    def await_end(self) -> None:
        """Returns once it has ended."""
        assert select.select([self._descriptor], [], [], 60)[0], "it lives on"
        os.close(self._descriptor)

    def stop(self) -> None:
        """SIGSTOP: it takes in, and does nothing."""
        signal.pidfd_send_signal(self._descriptor, signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL; returns once it has ended."""
        with suppress(ProcessLookupError):  # it went with another one
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        self.await_end()


@contextmanager
def full_disk(sp: RunningSp) -> Iterator[None]:
    """The daemon cannot write its log beyond what an interface's memory, a file too, needs; and the log has come that far."""
    for _ in range(40):
        sp.destroy(sp.launch())
    resource.prlimit(sp.process.pid, resource.RLIMIT_FSIZE, (crb.MEMORY_BYTES, resource.RLIM_INFINITY))
    yield
    resource.prlimit(sp.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
