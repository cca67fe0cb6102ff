"""Processes that outlive the agent which started them: found again by their command line, watched by a descriptor, ended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

_ROUNDS: Final = 100


class MachineProcess:
    """A process, whoever started it. Life: construct → … → it ends, or `kill()`.

    Args:
        pid: of the process.
        on_end: called in the event loop when it has ended, whoever ended it.
        uid: of a user whose processes all end with it; None: those of its session do.

    Raises:
        ProcessLookupError: there is none.
    """

    def __init__(self, pid: int, on_end: Callable[[], None], uid: int | None = None) -> None:
        self.pid = pid
        self._uid = uid
        self._descriptor = os.pidfd_open(pid)
        self._on_end = on_end
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._descriptor, self._has_ended)

    def _has_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        for _ in range(_ROUNDS):  # before it is buried: until then, nobody else has its number
            if not self._end_what_it_started():
                break
        with suppress(ChildProcessError):  # one that an earlier agent started is not ours to bury
            os.waitpid(self.pid, os.WNOHANG)
        self.ended.set()
        self._on_end()

    def _end_what_it_started(self) -> bool:
        """Returns whether there was anything of its user's: that may have started others meanwhile."""
        found = False
        for pid in _processes():
            with suppress(OSError, ValueError):
                is_its_users = self._uid is not None and _uid(pid) == self._uid and not _is_zombie(pid)
                if is_its_users or os.getsid(pid) == self.pid:
                    os.kill(pid, signal.SIGKILL)
                found = found or is_its_users
        return found

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


def find_machines(command: str) -> dict[Path, int]:
    """Processes that lead a session and were told `command` and a directory of their user's: their ids by that directory.

    Source: proc(5), /proc/pid/cmdline.
    """
    found: dict[Path, int] = {}
    for pid in _processes():
        with suppress(OSError, ValueError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
            directory = Path(words[words.index(command) + 1])
            if directory.is_absolute() and directory.stat().st_uid == _uid(pid) and os.getsid(pid) == pid:
                found[directory] = pid
    return found


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208  # names alone


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def _uid(pid: int) -> int:
    """The real user id. Source: proc(5), /proc/pid/status; the owner of /proc/pid is another's if it cannot be dumped."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[1])
    raise ValueError
