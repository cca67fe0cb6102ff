"""The opponent: the system's swtpm, one process per vTPM, plain commands over a unix socket."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_START_TIMEOUT_S = 10.0
_RETRY_S = 0.00005
_ANSWER_TIMEOUT_S = 60
_MAX_RESPONSE_BYTES = 4096
_SHUTDOWN, _STORE_VOLATILE = 0x03, 0x0A
"""Control commands. Source: swtpm, include/swtpm/tpm_ioctl.h."""


def find_swtpm() -> str:
    """Path of the system's swtpm.

    Raises:
        FileNotFoundError: it is not installed.
    """
    path = shutil.which("swtpm")
    if path is None:
        raise FileNotFoundError("no swtpm to compare with: install the package `swtpm`")
    return path


def swtpm_version(path: str) -> str:
    """Its version, as it says itself: "0.7.1"."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return said.removeprefix("TPM emulator version ").partition(",")[0].strip()


class SwtpmSetup:
    """Makes states for swtpm with `swtpm_setup`, certified by a local CA of its own.

    Args:
        directory: for the CA; made.

    Raises:
        FileNotFoundError: a program is missing.
    """

    def __init__(self, directory: Path) -> None:
        for program in ("swtpm_setup", "swtpm_localca", "swtpm_cert"):
            if shutil.which(program) is None:
                raise FileNotFoundError(f"no {program} to compare with: install the package `swtpm-tools`")
        directory.mkdir()
        self._config = directory / "setup.conf"
        tool = f"{shutil.which('swtpm_localca')}"
        options, ca = directory / "options", directory / "ca.conf"
        self._config.write_text(
            f"create_certs_tool = {tool}\ncreate_certs_tool_config = {ca}\ncreate_certs_tool_options = {options}\n"
        )
        files = {"signingkey": "key.pem", "issuercert": "issuer.pem", "certserial": "serial"}
        ca.write_text(
            f"statedir = {directory}\n" + "".join(f"{key} = {directory / name}\n" for key, name in files.items())
        )
        options.write_text("--platform-manufacturer Example\n--platform-version 1\n--platform-model Example\n")
        first = directory / "first"
        first.mkdir()
        self.make(first)  # the CA itself is made with the first state

    def make(self, state: Path) -> None:
        """A TPM with certificates of EK and platform, in an empty directory."""
        user = pwd.getpwuid(os.geteuid()).pw_name
        subprocess.run(
            [
                *("swtpm_setup", "--tpm2", "--runas", user, "--tpmstate", state, "--config", self._config),
                *("--create-ek-cert", "--create-platform-cert"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )


class Swtpm:
    """One swtpm. Life: construct (its process is spawned) → `connect()` → `transmit()` … → `stop()`.

    TPM2_Startup it does by itself (startup-clear), unless it goes on. Its state directory may hold a TPM already; else it
    makes one.

    Args:
        path: of the program.
        state: an empty directory, or one that an earlier swtpm left.
        goes_on: whether it goes on where `suspend` has ended another one, with no TPM2_Startup.
    """

    def __init__(self, path: str, state: Path, *, goes_on: bool = False) -> None:
        self.state = state
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [
            *(path, "socket", "--tpm2", "--tpmstate", f"dir={state}"),
            *("--server", f"type=unixio,path={state / 'data'}", "--ctrl", f"type=unixio,path={state / 'ctrl'}"),
            *("--flags", "not-need-init" if goes_on else "not-need-init,startup-clear"),
        ]
        # close_fds=False: Python's fastest way to spawn; all descriptors of ours are close-on-exec.
        self.process = subprocess.Popen(
            command, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def connect(self) -> Self:
        """Connects as soon as it listens; looks every 50 µs.

        Raises:
            TimeoutError: it does not.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        address = str(self.state / "data")
        while True:
            try:
                self._socket.connect(address)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise TimeoutError(f"swtpm does not listen at {address}") from None
                time.sleep(_RETRY_S)
        # The kernel's own timeout: Python's would cost a poll() on every transfer.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _ANSWER_TIMEOUT_S, 0))
        return self

    def transmit(self, command: bytes) -> bytes:
        """One command, its response."""
        self._socket.sendall(command)
        return self._socket.recv(_MAX_RESPONSE_BYTES)

    def transmit_durably(self, command: bytes) -> bytes:
        """One command, its response, and then what swtpm leaves out: its state file and directory on the disk."""
        response = self.transmit(command)
        for name in ("tpm2-00.permall", "."):
            descriptor = os.open(self.state / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return response

    def suspend(self) -> None:
        """Has it write its volatile state too, and end: nothing of the TPM is lost. `stop` it then."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self.state / "ctrl"))
            for command in (_STORE_VOLATILE, _SHUTDOWN):
                control.sendall(struct.pack(">I", command))
                (result,) = struct.unpack(">I", control.recv(4))
                if result:
                    raise OSError(f"swtpm refuses control command {command}: {result}")
        self.process.wait(_START_TIMEOUT_S)

    def stop(self) -> None:
        """Ends it; its permanent state stays."""
        self._socket.close()
        self.process.kill()
        self.process.wait()
        for name in ("data", "ctrl"):
            (self.state / name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
