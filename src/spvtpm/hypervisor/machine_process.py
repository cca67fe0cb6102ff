"""Processes that outlive the agent which started them: found again by their command line, watched by a descriptor, ended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class MachineProcess:
    """A process, whoever started it. Life: construct → … → it ends, or `kill()`.

    Args:
        pid: of the process.
        on_end: called in the event loop when it has ended, whoever ended it.

    Raises:
        ProcessLookupError: there is none.
    """

    def __init__(self, pid: int, on_end: Callable[[], None]) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)
        self._on_end = on_end
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._descriptor, self._has_ended)

    def _has_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it has started
        with suppress(ChildProcessError):  # one that an earlier agent started is not ours to bury
            os.waitpid(self.pid, os.WNOHANG)
        self.ended.set()
        self._on_end()

    async def wait(self, patience_s: float) -> bool:
        """Waits for its end; False: it goes on."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.ended.wait()
        return self.ended.is_set()

    async def kill(self) -> None:
        """Ends it; returns once it is gone."""
        if not self.ended.is_set():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        await self.ended.wait()


def find_sessions(command: str) -> dict[str, int]:
    """Processes that lead a session and have `command` as a word of their command line: their ids by the word behind it.

    Source: proc(5), /proc/pid/cmdline.
    """
    found: dict[str, int] = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        with suppress(OSError, ValueError):
            pid = int(directory.name)
            words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
            argument = words[words.index(command) + 1]
            if os.getsid(pid) == pid:
                found[argument] = pid
    return found
