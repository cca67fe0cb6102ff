"""tpm2-tools in a directory, on one TPM."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class Tools:
    """Runs TPM programs as a person would: one process per command, files between them.

    Args:
        tcti: the value of TPM2TOOLS_TCTI.
        directory: where their files are.
    """

    def __init__(self, tcti: str, directory: Path) -> None:
        self.directory = directory
        self._environment = {**os.environ, "TPM2TOOLS_TCTI": tcti, "LC_ALL": "C.UTF-8"}

    def attempt(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Runs a command, whatever comes of it."""
        return subprocess.run(
            words,
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Starts a command and does not wait."""
        return subprocess.Popen(
            words,
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: str) -> bytes:
        """Runs a command that must succeed; returns what it printed."""
        done = self.attempt(*words)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr.decode()}"
        return done.stdout

    def refused(self, *words: str) -> str:
        """Runs a command that must fail; returns its complaints."""
        done = self.attempt(*words)
        assert done.returncode != 0, f"{' '.join(words)} succeeded"
        return done.stderr.decode()

    def flush(self, *kinds: str) -> None:
        """Empties key slots, as a resource manager does between programs; sessions too if they are named."""
        for kind in kinds or ("-t",):
            self.run("tpm2_flushcontext", kind)

    def attestation_key_under(self, ek: str) -> str:
        """Makes an attestation key, `ak.ctx`; its name in hexadecimal, as tools want it for a credential."""
        parts = ("-c", "ak.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", "-n", "ak.name")
        self.run("tpm2_createak", "-Q", "-C", ek, *parts)
        self.flush("-t")
        return self.read("ak.name").hex()

    def pcr(self, number: int, bank: str = "sha256") -> bytes:
        """A PCR."""
        return bytes.fromhex(self.run("tpm2_pcrread", f"{bank}:{number}").decode().rpartition("0x")[2].strip())

    def write(self, name: str, content: bytes) -> str:
        """Puts a file where the tools find it; returns its name."""
        (self.directory / name).write_bytes(content)
        return name

    def read(self, name: str) -> bytes:
        """A file that a tool wrote."""
        return (self.directory / name).read_bytes()
