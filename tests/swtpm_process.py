"""swtpm, or a program whose command line is the same, as a process with a control socket."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

from tests.emulator_client import PATIENCE_S

needs_swtpm = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")


class RunningSwtpm:
    """A process with a TPM that is off. The block gets the path of its control socket.

    Args:
        directory: for state and socket; its path has to be short.
        program: the command's first words.
        more: its last words.
    """

    def __init__(self, directory: Path, program: tuple[str, ...] = ("swtpm",), more: tuple[str, ...] = ()) -> None:
        self.control = directory / "control"
        state = directory / "state"
        state.mkdir(exist_ok=True)
        pid_file = directory / "pid"
        pid_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [
                *(*program, "socket", "--tpm2", "--tpmstate", f"dir={state}", "--pid", f"file={pid_file}"),
                *("--ctrl", f"type=unixio,path={self.control}", *more),
            ]
        )
        try:
            self._wait(pid_file)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _wait(self, pid_file: Path) -> None:
        """The file with its process id is written once the sockets listen."""
        for _ in range(int(PATIENCE_S / 0.05)):
            if pid_file.exists():
                return
            try:
                code = self.process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(f"it ended with {code}")
        raise AssertionError("it does not begin")

    def __enter__(self) -> Path:
        return self.control

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
