"""A guest that runs: QEMU on Debian's kernel, with a serial console that the test reads."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guests.kernel import KERNEL, QEMU

_PATIENCE_S = 120.0
"""A boot takes 5 to 10 seconds without KVM; this machine may be busy."""


class Guest:
    """A guest, booting. Ends with the block.

    Args:
        initramfs: its whole file system, as `Initramfs.write` has it.
        devices: further arguments for QEMU.
        append: further words for the kernel's command line.
        memory_mib: its memory.
        reboots: whether it may reboot; otherwise that is its end.
    """

    def __init__(
        self,
        initramfs: Path,
        devices: Sequence[str] = (),
        append: str = "",
        memory_mib: int = 256,
        *,
        reboots: bool = False,
    ) -> None:
        self._process = subprocess.Popen(
            [
                *(str(QEMU), "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,accel=tcg"),
                *("-cpu", "max", "-m", str(memory_mib), "-serial", "stdio"),
                *("-action", f"reboot={'reset' if reboots else 'shutdown'}"),
                *("-kernel", str(KERNEL), "-initrd", str(initramfs)),
                *("-append", f"console=ttyS0 quiet panic=-1 {append}"),
                *devices,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.pid = self._process.pid
        self.said = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Reads the console until the pattern is in what the guest has said; gives the match."""
        deadline = time.monotonic() + _PATIENCE_S
        assert self._process.stdout is not None
        while (match := re.search(pattern, self.said)) is None:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._process.stdout], [], [], max(left, 0))
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            assert data, (
                f"{'the guest ended' if ready else 'time is up'}; {pattern!r} is not in what it said:\n{self.said}"
            )
            self.said += data.decode(errors="replace").replace("\r", "")
        return match

    def enter(self, line: str) -> None:
        """Types a line on the console."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def kill(self, number: signal.Signals) -> None:
        """Sends QEMU a signal."""
        self._process.send_signal(number)

    def wait(self) -> str:
        """Waits for the guest's end; gives all that it said."""
        rest, _ = self._process.communicate(timeout=_PATIENCE_S)
        self.said += rest.decode(errors="replace").replace("\r", "")
        return self.said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
