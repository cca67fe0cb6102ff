"""One part of the stack as a process: started, awaited until it says that it listens, stopped. `supervisor.py` comes in."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from spvtpm.wire.platform_errors import PartFailed

READY: Final = b"listening on "
"""How each part's first line on stdout begins, once it can be used; the rest of it is where."""

START_PATIENCE_S: Final = 120.0
STOP_PATIENCE_S: Final = 120.0
"""An agent powers its VMs off, a secure processor shuts its vTPMs down."""

_LONGEST_LINE_BYTES = 1 << 16


class Part:
    """A command of `spvtpm` that runs until it is told to end.

    If the process that started it dies, the kernel tells it to end: a stack without its `spvtpm up` does not stay behind.

    Args:
        name: what a person reads, and its log is called.
        words: the command, behind `spvtpm`.
        log: what it prints and logs is put behind what is there.
        keep_open: a descriptor that stays open as long as the process lives.
    """

    def __init__(self, name: str, words: Sequence[str], log: Path, keep_open: int) -> None:
        self.name = name
        self.log = log
        self.address = ""
        self._words = tuple(words)
        self._keep_open = keep_open
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of its process, if it has been started."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Starts it; returns once it listens.

        Raises:
            PartFailed: it ended, or does not come to an end of its start.
        """
        with self.log.open("ab") as log:
            # Its own session: Ctrl-C is for `spvtpm up`, which ends its parts in order.
            self._process = await asyncio.create_subprocess_exec(
                *_dying_with_us(),
                *(sys.executable, "-m", "spvtpm.cli", *self._words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                pass_fds=(self._keep_open,),
                limit=_LONGEST_LINE_BYTES,
            )
        try:
            async with asyncio.timeout(START_PATIENCE_S):
                self.address = await self._until_it_listens(self._process)
        except TimeoutError:
            await self.kill()
            raise PartFailed(f"{self.name} does not come up; its log is {self.log}") from None
        except BaseException:
            await self.kill()
            raise
        self._output = asyncio.create_task(self._copy(self._process))

    async def _until_it_listens(self, process: asyncio.subprocess.Process) -> str:
        assert process.stdout is not None  # noqa: S101  # a pipe, as asked for
        while line := await process.stdout.readline():
            if line.startswith(READY):
                return line.removeprefix(READY).decode(errors="replace").strip()
            self._write(line)
        code = await process.wait()
        raise PartFailed(f"{self.name} ended while it started, {in_words(code)}; its log is {self.log}")

    async def _copy(self, process: asyncio.subprocess.Process) -> None:
        """What it prints later goes to the log, too."""
        assert process.stdout is not None  # noqa: S101  # as above
        while data := await process.stdout.read(_LONGEST_LINE_BYTES):
            self._write(data)

    def _write(self, data: bytes) -> None:
        with self.log.open("ab") as log:
            log.write(data)

    async def ended(self) -> int:
        """Waits for its end; gives its exit code, or minus the signal that ended it."""
        assert self._process is not None  # noqa: S101  # it was started
        code = await self._process.wait()
        if self._output is not None:
            self._output.cancel()  # what it had started may still hold the other end
        return code

    async def stop(self) -> bool:
        """Ends it in order; says whether that went well, or it had to be killed."""
        if self._process is None or self._process.returncode is not None:
            return True
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_PATIENCE_S):
                await self.ended()
        except TimeoutError:
            await self.kill()
            return False
        return True

    async def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self.ended()


def in_words(code: int) -> str:
    """An exit code, as a person reads it."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def _dying_with_us() -> tuple[str, ...]:
    """Source: setpriv(1), --pdeathsig; prctl(2), PR_SET_PDEATHSIG."""
    return ("setpriv", "--pdeathsig", "TERM", "--") if shutil.which("setpriv") else ()
