"""Commands that a VM's owner has run in it, each a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from spvtpm.guest.own_process import bury_orphans, end_descendants
from spvtpm.wire.errors import ChannelError
from spvtpm.wire.platform_errors import CommandNotBegun

NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
"""Exit codes of a command that cannot be run. Source: POSIX.1-2008, Shell Command Language, section 2.8.2."""

_END_S: Final = 2.0
_HALT_S: Final = 5.0
_LOOK_S: Final = 0.5

_Entry = Literal["open", "held", "shut"]
"""Whether commands may begin: now; later, and they wait; not at all."""

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Source: Debian, login.defs, ENV_SUPATH."""


class Commands:
    """All commands under way. Thread-safe. What begins is not reaped before `bury`, so that its number stays its own until then.

    Args:
        memory: the VM's memory, their directory.
        tcti: how TPM clients reach the vTPM; empty: there is none.
    """

    def __init__(self, memory: Path, tcti: str) -> None:
        self._memory = memory
        self._environment = {
            "PATH": _PATH,
            "HOME": str(memory),
            "LANG": "C.UTF-8",
            **({"TPM2TOOLS_TCTI": tcti} if tcti else {}),
        }
        self._changed = threading.Condition()
        self._running = set[subprocess.Popen[bytes]]()
        self._entry: _Entry = "open"

    def await_entry(self, has_gone: Callable[[], bool]) -> None:
        """Waits while the VM is halted.

        Args:
            has_gone: whether whoever wants to come in does not any more.

        Raises:
            CommandNotBegun: the VM is powered off.
            ChannelError: he has gone.
        """
        with self._changed:
            self._await_entry(has_gone)

    def _await_entry(self, has_gone: Callable[[], bool]) -> None:
        was_held = False
        while self._entry == "held":
            was_held = True
            if not self._changed.wait(_LOOK_S) and has_gone():
                raise ChannelError("the owner has gone")
        if was_held and self._entry == "shut":
            raise CommandNotBegun("the VM was halted, and has gone before the command could begin")

    def start(self, arguments: Sequence[str], has_gone: Callable[[], bool]) -> subprocess.Popen[bytes]:
        """Starts a command with pipes to and from it.

        Args:
            arguments: the program, and what it is told.
            has_gone: as for `await_entry`.

        Raises:
            CommandNotBegun: the VM is being suspended or powered off.
            ChannelError: as of `await_entry`.
            OSError: it cannot be run.
        """
        with self._changed:
            self._await_entry(has_gone)
            if self._entry == "shut":
                raise CommandNotBegun("the VM is being suspended or powered off")
            command = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._memory,
                env=self._environment,
                process_group=0,
                bufsize=0,
            )
            self._running.add(command)
        return command

    def await_end(self, command: subprocess.Popen[bytes]) -> None:
        """Returns once the command has ended, and what it has started perhaps not."""
        with suppress(ChildProcessError):  # it was buried
            os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOWAIT)

    def bury(self, command: subprocess.Popen[bytes]) -> None:
        """The command is over; what is left of its process group is ended."""
        with self._changed:
            if command in self._running:
                _signal(command, signal.SIGKILL)
                command.wait()
                self._running.discard(command)
                self._changed.notify_all()

    def bury_orphans(self) -> None:
        """Takes note of the end of what commands have left behind."""
        with self._changed:
            bury_orphans({command.pid for command in self._running})

    def end_all(self) -> None:
        """Ends all of them, and all that they have left behind, and lets no other begin.

        Raises:
            ResourceError: something does not end.
        """
        self._close("shut", 0.0)

    def halt(self) -> None:
        """Lets all of them end, for a while, then ends what is left; others wait.

        Raises:
            ResourceError: something does not end.
        """
        self._close("held", _HALT_S)

    def _close(self, entry: _Entry, patience_s: float) -> None:
        with self._changed:
            self._entry = entry
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._running, patience_s):
                for command in self._running:
                    _signal(command, signal.SIGTERM)
                self._changed.wait_for(lambda: not self._running, _END_S)
        end_descendants()

    def go_on(self) -> None:
        """Lets commands begin again."""
        with self._changed:
            self._entry = "open"
            self._changed.notify_all()


def _signal(command: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(command.pid, number)
