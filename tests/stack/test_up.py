"""`spvtpm up`: a whole cloud by one command, used as its first user does, killed part by part, ended, and begun again."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cloud_stack import SPVTPM, CloudUser
from tests.harness import has_ended
from tests.processor.processes import wait_until

PCR_0 = ("vm", "exec", "web", "--", "tpm2_pcrread", "sha256:0")


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where a cloud can be made."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-", ignore_cleanup_errors=True) as parent:
        yield Path(parent) / "cloud"


class RunningUp:
    """`spvtpm up --json` as a process of its own.

    Args:
        directory: where the cloud is kept.
        words: further ones of the command line.
    """

    def __init__(self, directory: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [*SPVTPM, "up", str(directory), "--json", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "".join(self.process.stderr or [])
        self.told: dict[str, Any] = json.loads(line)
        self.user = CloudUser(Path(self.told["keyring"]), Path(self.told["token_file"]))

    def hear(self, words: str) -> str:
        """Waits until it says this."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError(f"it ended, and never said {words!r}: {self.said}")

    def pid_of(self, part: str) -> int:
        """Of the process of a part."""
        kind, state = part.partition("-")[0], Path(self.told["directory"]).resolve() / part
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    words = (entry / "cmdline").read_bytes().decode().split("\0")[:-1]
                except OSError:
                    continue
                if words[-3:-1] == [kind, "run"] and Path(words[-1]).resolve() == state:
                    return int(entry.name)
        raise AssertionError(f"{part} does not run")

    def kill(self, part: str) -> None:
        """SIGKILL for one part; returns once it runs again."""
        os.kill(self.pid_of(part), signal.SIGKILL)
        self.hear(f"{part} has ended (killed by SIGKILL)")
        self.hear(f"{part} runs again")

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C, or another signal; gives the exit code."""
        self.process.send_signal(number)
        self.said += self.process.communicate(timeout=120)[1].splitlines(keepends=True)
        return self.process.returncode


@contextmanager
def running(directory: Path, *words: str) -> Iterator[RunningUp]:
    """Up; at the end, in order."""
    up = RunningUp(directory, *words)
    try:
        yield up
    finally:
        if up.process.poll() is None:
            up.end(signal.SIGTERM)


def test_a_vm_is_used_and_goes_on_after_ctrl_c_and_another_start(directory: Path) -> None:
    with running(directory) as up:
        up.user.run("vm", "create", "web")
        up.user.run("vm", "exec", "web", "--", "tpm2_pcrextend", f"0:sha256={'ab' * 32}")
        up.user.run("vm", "exec", "web", "--", "tpm2_nvdefine", "0x1500016", "-s", "8")
        up.user.run("vm", "exec", "web", "--", "tpm2_nvwrite", "0x1500016", "-i", "-", stdin=b"kept all")
        assert up.end() == 0
    with running(directory) as up:
        (vm,) = up.user.run_json("vm", "ls")
        assert vm["name"] == "web"
        assert up.user.run("vm", "exec", "web", "--", "tpm2_nvread", "0x1500016") == b"kept all"
        assert b"0x" + b"0" * 64 in up.user.run(*PCR_0)  # another boot


def test_each_part_is_killed_and_the_vm_is_used_on(directory: Path) -> None:
    with running(directory) as up:
        up.user.run("vm", "create", "web", "--host", "host-1")
        before = up.user.run(*PCR_0)
        up.kill("cloud")
        assert up.user.run(*PCR_0) == before
        up.kill("agent-1")
        assert up.user.run(*PCR_0) == before
        up.kill("sp-1")  # a power cut for the VM, too: it is booted anew
        wait_until(lambda: up.user.attempt(*PCR_0).stdout == before)
        assert up.end() == 0


def test_what_is_made_is_private_and_the_platform_listens_here_alone(directory: Path) -> None:
    with running(directory) as up:
        for name in ("token_file", "keyring"):
            assert stat.S_IMODE(Path(up.told[name]).stat().st_mode) & 0o077 == 0
        token = Path(up.told["token_file"]).read_text().strip()
        assert up.told["url"].startswith("http://127.0.0.1:")
        assert token not in json.dumps(up.told)
        assert all(token not in log.read_text() for log in (directory / "log").iterdir())
        assert {chip["host"] for chip in (c["platform_says"] for c in up.user.run_json("chips"))} == {
            "host-1",
            "host-2",
        }


def test_another_port_is_taken_if_somebody_has_the_first_and_the_user_is_told(directory: Path) -> None:
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        port = somebody.getsockname()[1]
        with running(directory, "--port", str(port)) as up:
            assert up.told["url"] != f"http://127.0.0.1:{port}"
            up.user.run("chips")
            assert up.end() == 0
            assert any(f"port {port} is in use" in line for line in up.said)


def test_a_stack_that_is_killed_takes_its_parts_along_and_the_next_one_goes_on(directory: Path) -> None:
    with running(directory) as up:
        parts = [os.pidfd_open(up.pid_of(part)) for part in ("cloud", "agent-1", "agent-2", "sp-1", "sp-2")]
        up.process.kill()
        up.process.communicate()
        assert all(has_ended(part, 60_000) for part in parts)
    with running(directory) as up:
        up.user.run("chips")


def test_a_part_that_cannot_start_ends_all_and_names_its_log(directory: Path) -> None:
    with running(directory):
        pass
    (directory / "sp-2" / "sp.toml").write_text("nonsense = 1\n")
    done = subprocess.run([*SPVTPM, "up", str(directory)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 4
    assert f"{directory}/log/sp-2.log" in done.stderr and "[part-failed]" in done.stderr


def test_a_person_is_told_what_to_type_next(directory: Path) -> None:
    up = subprocess.Popen(
        [Path(sys.executable).with_name("spvtpm"), "up", str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert up.stdout is not None
    said = ""
    for line in up.stdout:
        said += line
        if "Ctrl-C ends it" in line:
            break
    up.send_signal(signal.SIGINT)
    said += up.communicate(timeout=120)[0]
    assert up.returncode == 0
    for words in ("spvtpm vm create web", f"export XDG_DATA_HOME={directory}/user", "/console", "sp-1", "agent-2"):
        assert words in said
