"""The hosts of the demo, as real processes: a secure processor, and the agent that runs VMs beside it; and who makes chips."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spvtpm.demo.story import Story
from spvtpm.hypervisor.machine_process import find_machines
from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.processor.daemon import initialise
from spvtpm.vendor.authority import REVOCATION_LIST_FILE, init_vendor
from spvtpm.vendor.factory import manufacture_chip
from spvtpm.wire import messages

SPVTPM = (sys.executable, "-m", "spvtpm.cli")
PATIENCE_S = 30.0


class ActFailed(Exception):
    """A command of the story did not do what it should; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tool did.

    Attributes:
        ok: whether its exit code was 0.
        output: what it printed.
        complaint: its most telling line on stderr.
        remarks: all lines on stderr.
    """

    ok: bool
    output: bytes
    complaint: str
    remarks: tuple[str, ...] = ()


_OLDER_FIRMWARE = """
from spvtpm.processor import daemon
daemon.FIRMWARE_VERSION = {}
from spvtpm.cli import main
main()
"""


def start(words: list[str], log: Path, awaited: bytes, program: Sequence[str] = SPVTPM) -> subprocess.Popen[bytes]:
    """Starts one of our own processes and waits for its first line."""
    with log.open("ab") as errors:
        process = subprocess.Popen([*program, *words], stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL)
    try:
        assert process.stdout is not None  # noqa: S101  # a pipe, as asked for
        with process.stdout as output:
            ready, _, _ = select.select([output], [], [], PATIENCE_S)
            if not ready or not output.readline().startswith(awaited):
                said = log.read_text().strip() or "it said nothing"
                raise ActFailed(f"spvtpm {' '.join(words[:2])} does not start: {said[-600:]}")
    except BaseException:
        end(process, signal.SIGKILL)
        raise
    return process


def end(process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
    """Ends one, if it runs."""
    if process is None or process.poll() is not None:
        return
    process.send_signal(number)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_tool(words: list[str], directory: Path, environment: Mapping[str, str]) -> Outcome:
    """Runs a program to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPM2", "TSS2", "TCTI"))}
    try:
        done = subprocess.run(
            words,
            cwd=directory,
            env={**clean, "LC_ALL": "C.UTF-8", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(False, b"", f"it did not end within {PATIENCE_S:g} s")
    return telling(done.returncode, done.stdout, done.stderr)


def telling(code: int, output: bytes, errors: bytes) -> Outcome:
    """What a tool did, with its most telling line picked out."""
    complaints = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    ours = [line for line in complaints if line.startswith(("ERROR: ", "spvtpm: "))]
    complaint = (ours or complaints or [f"exit code {code}"])[0]
    return Outcome(code == 0, output, complaint, tuple(complaints))


class ChipVendor:
    """Who makes chips, offline.

    Args:
        name: of its directory.
        directory: of the story.
        story: where commands are shown.
    """

    def __init__(self, name: str, directory: Path, story: Story) -> None:
        self.name = name
        self.directory = directory / name
        self._story = story
        self._story.command(f"{name}$", ["spvtpm", "vendor", "init", name, "--name", "Example Silicon"])
        init_vendor(self.directory, "Example Silicon")

    def manufacture(self, chip: str) -> Path:
        """A new chip of its fleet, as a file."""
        self._story.command(f"{self.name}$", ["spvtpm", "vendor", "manufacture", self.name, chip])
        manufacture_chip(self.directory, self.directory.with_name(chip))
        return self.directory.with_name(chip)


class SecureProcessorHost:
    """A host: a secure processor, and the agent beside it that runs VMs as the platform orders.

    Args:
        name: its state goes to a directory of this name.
        directory: of the story.
        story: where commands are shown.
        firmware: an older version than ours; None: ours.
    """

    def __init__(self, name: str, directory: Path, story: Story, firmware: int | None = None) -> None:
        self.name = name
        self._program = SPVTPM if firmware is None else (sys.executable, "-c", _OLDER_FIRMWARE.format(firmware))
        self.state = directory / name
        self._log = directory / f"{name}.log"
        self._story = story
        self._process: subprocess.Popen[bytes] | None = None
        self.agent_state = directory / f"{name}-agent"
        self._agent: subprocess.Popen[bytes] | None = None

    @property
    def _prompt(self) -> str:
        return f"{self.name}#"

    def make(self, chip: Path) -> None:
        """A new secure processor with this chip: fuses and an empty store."""
        self._story.command(self._prompt, ["spvtpm", "sp", "init", self.name, "--chip", chip.name])
        initialise(self.state, chip)

    def start(self) -> None:
        """Its daemon."""
        self._story.command(self._prompt, ["spvtpm", "sp", "run", self.name])
        self._process = start(["sp", "run", str(self.state)], self._log, b"listening", self._program)

    def make_agent(self, vendor: ChipVendor) -> None:
        """A new agent beside it, which reads this vendor's list of revoked chips."""
        listed = vendor.directory / REVOCATION_LIST_FILE
        words = ["agent", "init", str(self.agent_state), "--sp", str(self.state), "--revocation-list", str(listed)]
        shown = ["--sp", self.name, "--revocation-list", f"{vendor.name}/{REVOCATION_LIST_FILE}"]
        self._story.command(self._prompt, ["spvtpm", "agent", "init", f"{self.name}-agent", *shown])
        done = run_tool([*SPVTPM, *words], self.state.parent, {})
        if not done.ok:
            raise ActFailed(f"spvtpm agent init: {done.complaint}")

    def start_agent(self) -> None:
        """Its agent; VMs that were ordered to run are booted."""
        self._story.command(self._prompt, ["spvtpm", "agent", "run", f"{self.name}-agent"])
        self._agent = start(["agent", "run", str(self.agent_state)], self._log, b"listening")

    def machine_pid(self, vm_id: uuid.UUID) -> int | None:
        """Process id of a VM's machine."""
        return find_machines("machine").get(self.agent_state / "vms" / str(vm_id) / "machine")

    @property
    def pid(self) -> int:
        """Of the daemon."""
        assert self._process is not None  # noqa: S101  # it was started
        return self._process.pid

    def hypervisor(self, command: str, request: messages.Request) -> messages.Reply:
        """One command of the hypervisor, as `spvtpm hypervisor` sends it."""
        vm_id = getattr(request, "vm_id", None)
        words = ["spvtpm", "hypervisor", command, *([] if vm_id is None else [str(vm_id)]), "--sp", self.name]
        self._story.command(self._prompt, words)
        with SecureProcessorClient(self.state / "run" / "sp.sock") as client:
            return client.call(request)

    def interface(self, vm_id: uuid.UUID) -> Path:
        """Where the VM's interface is offered."""
        return self.state / "run" / f"{vm_id}.sock"

    def log_lines(self, word: str) -> list[str]:
        """The lines of its log with that word, without their time."""
        return [line.split(" ", 2)[-1] for line in self._log.read_text().splitlines() if word in line]

    def processes(self) -> frozenset[int]:
        """Process ids of everything below the daemon."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                except OSError:  # ended meanwhile
                    continue
                if fields[0] != b"Z":
                    parents[int(entry.name)] = int(fields[1])
        found: set[int] = set()
        level = {self.pid}
        while level:
            level = {pid for pid, parent in parents.items() if parent in level}
            found |= level
        return frozenset(found)

    def kill(self) -> None:
        """SIGKILL of the daemon."""
        end(self._process, signal.SIGKILL)

    def lose_power(self) -> None:
        """SIGKILL of all that runs there: what a power cut is to processes."""
        end(self._agent, signal.SIGKILL)
        for path, pid in find_machines("machine").items():
            if path.is_relative_to(self.agent_state):
                os.kill(pid, signal.SIGKILL)
        self.kill()

    def stop_agent(self) -> None:
        """Its agent, in order: VMs are powered off."""
        end(self._agent, signal.SIGTERM)

    def stop(self) -> None:
        """All of it, in order."""
        self.stop_agent()
        end(self._process, signal.SIGTERM)


def wait_until(condition: Callable[[], bool], patience_s: float = 10.0) -> bool:
    """Asks again and again until the condition holds; returns whether it did before the patience ended."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
