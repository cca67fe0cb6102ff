"""What the emulated VM's process asks of Linux for itself and for all that comes from it: the VM's programs."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from spvtpm.wire.errors import ResourceError

_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36
"""Source: Linux, include/uapi/linux/prctl.h."""

_PATIENCE_S: Final = 5.0
_LOOK_S: Final = 0.01


def protect_own_memory() -> None:
    """No core dump, and no reading by other processes of the same user, the VM's programs among them.

    Raises:
        ResourceError: it cannot be had.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Programs whose parents have ended become this process's children: none gets out of its sight, or outlives the VM.

    Raises:
        ResourceError: it cannot be had.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def bury_orphans(but: set[int]) -> None:
    """Takes note of the end of children.

    Args:
        but: those of which somebody else does.
    """
    for pid, (parent, is_over) in _processes().items():
        if parent == os.getpid() and is_over and pid not in but:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def end_descendants() -> None:
    """Ends all processes that have come from this one. First they are stopped, or they could multiply faster than they end.

    Raises:
        ResourceError: some do not end.
    """
    stopped = set[int]()
    while new := _descendants() - stopped:
        _signal(new, signal.SIGSTOP)
        stopped |= new
    deadline = time.monotonic() + _PATIENCE_S
    while left := _descendants():
        _signal(left, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ResourceError(f"{len(left)} processes of the VM do not end")
        time.sleep(_LOOK_S)


def _descendants() -> set[int]:
    """Those that have not ended."""
    processes = _processes()
    found, queue = set[int](), [os.getpid()]
    while queue:
        parent = queue.pop()
        children = {pid for pid, (its, _is_over) in processes.items() if its == parent} - found
        found |= children
        queue += children
    return {pid for pid in found if not processes[pid][1]}


def _processes() -> dict[int, tuple[int, bool]]:
    """All that can be seen: the parent, and whether it has ended and waits to be buried. Source: proc(5), /proc/pid/stat."""
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with suppress(OSError):  # it has gone meanwhile
                _name, _, rest = (directory / "stat").read_bytes().rpartition(b")")  # which may hold anything
                state, parent = rest.split()[:2]
                found[int(directory.name)] = int(parent), state in (b"Z", b"X")
    return found


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(argument), *[ctypes.c_ulong(0)] * 3) != 0:
        raise ResourceError(f"prctl {option} is refused: {os.strerror(ctypes.get_errno())}")
