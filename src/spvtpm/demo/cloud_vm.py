"""A VM of the demo: a machine at the platform, in which its owner has tools run over the VM's console."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field

from spvtpm.demo.owner import OwnerTerminal
from spvtpm.demo.stage import ActFailed, Outcome, telling
from spvtpm.demo.story import Story
from spvtpm.terminal.machines import Site
from spvtpm.terminal.remote_command import run_in_vm
from spvtpm.wire.errors import SpvtpmError

_EMPTY_SLOTS = (
    "for kind in --transient-object --loaded-session --saved-session; do tpm2_flushcontext $kind; done "
    '>/dev/null 2>&1; exec "$@"'
)
"""What the kernel's resource manager (/dev/tpmrm0) does in a real VM between two programs."""

_TIDY = "for kind in --transient-object --loaded-session; do tpm2_flushcontext $kind; done >/dev/null 2>&1; "
"""The same, and sessions that are saved stay."""


@dataclass(slots=True)
class CloudVm:
    """One VM.

    Attributes:
        name: at the platform, and in its owner's keyring: `vm-a`.
        owner: whose it is.
        story: where commands are shown.
        disk: what lies on the VM's disk, which the demo keeps for it: an emulated VM has memory alone.
    """

    name: str
    owner: OwnerTerminal
    story: Story
    disk: dict[str, bytes] = field(default_factory=dict)

    @property
    def vm_id(self) -> uuid.UUID:
        """As its owner chose it."""
        return self.owner.keyring().owned(self.name).vm_id

    @property
    def key(self) -> bytes:
        """The VM key, as the owner has it."""
        return self.owner.keyring().owned(self.name).vm_key

    @property
    def _prompt(self) -> str:
        return f"{self.name}$"

    def attempt(self, *words: str) -> Outcome:
        """Runs a tool in the VM; TPM tools find the vTPM by themselves."""
        self.story.command(self._prompt, words)
        return self._exec(*(("sh", "-c", _EMPTY_SLOTS, "sh", *words) if words[0].startswith("tpm2_") else words))

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
            self.story.output(outcome.output.decode(errors="replace").splitlines())
        return outcome.output

    def use(self, script: str) -> bytes:
        """A shell's line of TPM tools that must succeed; sessions that are saved stay.

        Raises:
            ActFailed: it does not.
        """
        self.story.command(self._prompt, ["sh", "-c", script])
        outcome = self._exec("sh", "-c", _TIDY + script)
        if not outcome.ok:
            raise ActFailed(f"{script} in {self.name}: {outcome.complaint}")
        return outcome.output

    def write(self, name: str, content: bytes) -> None:
        """Puts a file into the VM.

        Raises:
            ActFailed: it cannot be put there.
        """
        if not self._exec("sh", "-c", 'cat > "$1"', "sh", name, stdin=content).ok:
            raise ActFailed(f"{name} cannot be put into {self.name}")

    def read(self, name: str) -> bytes:
        """Reads one of the VM's files.

        Raises:
            ActFailed: it is not there.
        """
        outcome = self._exec("cat", name)
        if not outcome.ok:
            raise ActFailed(f"{self.name}: {outcome.complaint}")
        return outcome.output

    def save_disk(self, *names: str) -> None:
        """Puts files on the VM's disk."""
        self.disk |= {name: self.read(name) for name in names}

    def load_disk(self) -> None:
        """Takes them back into its memory, after a boot."""
        for name, content in self.disk.items():
            self.write(name, content)

    def pcr(self, number: int) -> bytes:
        """One SHA-256 PCR."""
        value = self.run("tpm2_pcrread", f"sha256:{number}").decode().rpartition("0x")[2].strip()
        self.story.output([f"{number}: {value.lower()}"])
        return bytes.fromhex(value)

    def answers(self) -> bool:
        """Whether its TPM answers; shown to nobody."""
        return self._exec("tpm2_getrandom", "--hex", "4").ok

    def _exec(self, *words: str, stdin: bytes = b"") -> Outcome:
        return self.execute(self.owner.site(), *words, stdin=stdin)

    def execute(self, site: Site, *words: str, stdin: bytes = b"") -> Outcome:
        """What `spvtpm vm exec` does, without another process of the terminal each time.

        Args:
            site: of its owner; no other thread's.
            words: the command.
            stdin: what it reads.
        """
        written: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        source, sink = os.pipe()
        os.write(sink, stdin)  # a pipe holds what the demo has to say
        os.close(sink)
        try:
            owned = site.keyring.owned(self.name)
            code = run_in_vm(site, owned, words, lambda to, data: written[to].extend(data), source)
        except SpvtpmError as error:
            return Outcome(False, b"", str(error))
        finally:
            os.close(source)
        return telling(code, bytes(written["stdout"]), bytes(written["stderr"]))
