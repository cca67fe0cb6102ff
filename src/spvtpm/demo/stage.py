"""The cast of the demo, as real processes: a secure processor with its hypervisor, and VMs with TPM tools."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spvtpm.demo.story import Story
from spvtpm.guest.vm_key import create_vm_key
from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.processor.daemon import initialise
from spvtpm.vendor.authority import init_vendor
from spvtpm.vendor.factory import manufacture_chip
from spvtpm.wire import messages

_SPVTPM = (sys.executable, "-m", "spvtpm.cli")
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


def _start(words: list[str], log: Path, awaited: bytes) -> subprocess.Popen[bytes]:
    """Starts one of our own processes and waits for its first line."""
    with log.open("ab") as errors:
        process = subprocess.Popen([*_SPVTPM, *words], stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL)
    try:
        assert process.stdout is not None  # noqa: S101  # a pipe, as asked for
        with process.stdout as output:
            ready, _, _ = select.select([output], [], [], PATIENCE_S)
            if not ready or not output.readline().startswith(awaited):
                said = log.read_text().strip() or "it said nothing"
                raise ActFailed(f"spvtpm {' '.join(words[:2])} does not start: {said[-600:]}")
    except BaseException:
        _end(process, signal.SIGKILL)
        raise
    return process


def _end(process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
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
    complaints = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in complaints if line.startswith(("ERROR: ", "spvtpm: "))]
    complaint = (telling or complaints or [f"exit code {done.returncode}"])[0]
    return Outcome(done.returncode == 0, done.stdout, complaint, tuple(complaints))


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
    """A host: a secure processor and the hypervisor beside it.

    Args:
        name: its state goes to a directory of this name.
        directory: of the story.
        story: where commands are shown.
    """

    def __init__(self, name: str, directory: Path, story: Story) -> None:
        self.name = name
        self.state = directory / name
        self._log = directory / f"{name}.log"
        self._story = story
        self._process: subprocess.Popen[bytes] | None = None

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
        self._process = _start(["sp", "run", str(self.state)], self._log, b"listening")

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
        """SIGKILL: what a power cut is to a process."""
        _end(self._process, signal.SIGKILL)

    def stop(self) -> None:
        """In order."""
        _end(self._process, signal.SIGTERM)


class EmulatedVm:
    """A virtual machine, played by a directory with the VM's key, the process `spvtpm guest serve`, and TPM tools.

    Args:
        name: `vm-a`.
        directory: all it owns; made here.
        host: where it boots.
        story: where commands are shown.
    """

    def __init__(self, name: str, directory: Path, host: SecureProcessorHost, story: Story) -> None:
        self.name = name
        self.vm_id = uuid.uuid4()
        self.directory = directory
        self.key = directory / "vm.key"
        self._host = host
        self._story = story
        self._door: subprocess.Popen[bytes] | None = None
        directory.mkdir(mode=0o700)
        create_vm_key(self.key)

    def move_to(self, host: SecureProcessorHost) -> None:
        """It boots there from now on."""
        self._host = host

    def boot(self) -> None:
        """Starts the VM's one process: the driver of its vTPM, with a socket for the VM's TPM tools."""
        socket = self.directory / "tpm"
        words = ["guest", "serve", "--interface", str(self._host.interface(self.vm_id)), "--key", str(self.key)]
        self._story.command(
            self._prompt, ["spvtpm", "guest", "serve", "--interface=/dev/vtpm", "--key=vm.key", "--socket=tpm"]
        )
        self._door = _start([*words, "--socket", str(socket)], self.directory / "serve.log", b"serving")

    @property
    def pid(self) -> int:
        """Of the VM's process."""
        assert self._door is not None  # noqa: S101  # it was booted
        return self._door.pid

    @property
    def _prompt(self) -> str:
        return f"{self.name}$"

    def write(self, name: str, content: bytes) -> None:
        """Puts a file into the VM."""
        (self.directory / name).write_bytes(content)

    def read(self, name: str) -> bytes:
        """Reads one of the VM's files."""
        return (self.directory / name).read_bytes()

    def attempt(self, *words: str) -> Outcome:
        """Runs a tool in the VM; TPM tools find the vTPM by themselves."""
        self._story.command(self._prompt, words)
        if words[0].startswith("tpm2_"):
            self._empty_key_slots()
        return run_tool(list(words), self.directory, {"TPM2TOOLS_TCTI": f"swtpm:path={self.directory / 'tpm'}"})

    def run(self, *words: str, show: bool = False) -> bytes:
        """As `attempt`, for what must succeed.

        Args:
            words: the command.
            show: print what it printed.

        Raises:
            ActFailed: it did not.
        """
        outcome = self.attempt(*words)
        if not outcome.ok:
            raise ActFailed(f"{words[0]} in {self.name}: {outcome.complaint}")
        if show:
            self._story.output(outcome.output.decode(errors="replace").splitlines())
        return outcome.output

    def _empty_key_slots(self) -> None:
        """What the kernel's resource manager (/dev/tpmrm0) does in a real VM between two programs."""
        environment = {"TPM2TOOLS_TCTI": f"swtpm:path={self.directory / 'tpm'}"}
        for kind in ("--transient-object", "--loaded-session", "--saved-session"):
            run_tool(["tpm2_flushcontext", kind], self.directory, environment)

    def pcr(self, number: int) -> bytes:
        """One SHA-256 PCR."""
        value = self.run("tpm2_pcrread", f"sha256:{number}").decode().rpartition("0x")[2].strip()
        self._story.output([f"{number}: {value.lower()}"])
        return bytes.fromhex(value)

    def borrow_interface_of(self, other: EmulatedVm) -> Outcome:
        """Uses another VM's interface with this VM's key, over the `cmd` TCTI."""
        interface = self._host.interface(other.vm_id)
        command = f"exec {sys.executable} -m spvtpm.cli guest tcti --interface {interface} --key {self.key}"
        shown = f'TPM2TOOLS_TCTI="cmd:spvtpm guest tcti --interface={other.name}.sock --key=vm.key"'
        self._story.output([shown], style="bold")
        self._story.command(self._prompt, ["tpm2_getrandom", "--hex", "8"])
        return run_tool(["tpm2_getrandom", "--hex", "8"], self.directory, {"TPM2TOOLS_TCTI": f"cmd:{command}"})

    def kill(self) -> None:
        """The VM dies."""
        _end(self._door, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], patience_s: float = 10.0) -> bool:
    """Asks again and again until the condition holds; returns whether it did before the patience ended."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
