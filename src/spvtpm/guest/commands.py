"""Commands that a VM's owner has run in it, each a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from spvtpm.wire.errors import WrongState

NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
"""Exit codes of a command that cannot be run. Source: POSIX.1-2008, Shell Command Language, section 2.8.2."""

_END_S: Final = 2.0
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Source: Debian, login.defs, ENV_SUPATH."""


class Commands:
    """All commands under way. Thread-safe.

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
        self._lock = threading.Lock()
        self._running = set[subprocess.Popen[bytes]]()
        self._may_start = True

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a command with pipes to and from it.

        Raises:
            WrongState: the VM is being suspended or powered off.
            OSError: it cannot be run.
        """
        with self._lock:
            if not self._may_start:
                raise WrongState("the VM is being suspended or powered off")
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

    def bury(self, command: subprocess.Popen[bytes]) -> None:
        """The command is over; whatever it has started and left behind is ended."""
        _signal(command, signal.SIGKILL)
        command.wait()
        with self._lock:
            self._running.discard(command)

    def end_all(self) -> None:
        """Ends all of them, and lets no other begin."""
        with self._lock:
            self._may_start = False
            running = list(self._running)
        for command in running:
            _signal(command, signal.SIGTERM)
        for command in running:
            with suppress(subprocess.TimeoutExpired):
                command.wait(_END_S)
            _signal(command, signal.SIGKILL)

    def go_on(self) -> None:
        """Lets commands begin again."""
        with self._lock:
            self._may_start = True


def _signal(command: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(command.pid, number)
