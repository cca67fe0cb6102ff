"""The owners of the demo: their terminals, far away from the host, as the real command line."""

from __future__ import annotations

import sys
from pathlib import Path

from spvtpm.demo.stage import ActFailed, ChipVendor, EmulatedVm, Outcome, SecureProcessorHost, run_tool
from spvtpm.demo.story import Story


class OwnerTerminal:
    """A keyring and `spvtpm terminal`.

    Args:
        name: `owner`; the prompt, and the directory of the keyring.
        directory: of the story.
        story: where commands are shown.
    """

    def __init__(self, name: str, directory: Path, story: Story) -> None:
        self.name = name
        self._directory = directory
        self._story = story
        self.run("init")

    def attempt(self, *words: str) -> Outcome:
        """Runs a command of the terminal."""
        self._story.command(f"{self.name}$", ["spvtpm", "terminal", *words])
        program = [sys.executable, "-m", "spvtpm.cli", "terminal", *words]
        return run_tool(program, self._directory, {"XDG_DATA_HOME": str(self._directory / self.name)})

    def run(self, *words: str) -> Outcome:
        """As `attempt`, for what must succeed; shows what was said.

        Raises:
            ActFailed: it did not.
        """
        outcome = self.attempt(*words)
        if not outcome.ok:
            raise ActFailed(f"spvtpm terminal {words[0]}: {outcome.complaint}")
        self._story.output([*outcome.remarks, *outcome.output.decode(errors="replace").splitlines()])
        return outcome

    def trust(self, vendor: ChipVendor) -> None:
        """Takes a vendor's root and revocation list for good."""
        self.run("trust", f"{vendor.name}/root.pem", "--revoked", f"{vendor.name}/revoked.pem")

    def provision(self, vm: EmulatedVm, host: SecureProcessorHost) -> None:
        """Makes the VM at this host's secure processor, with the key that the VM has, too."""
        self.run("provision", str(vm.vm_id), "--channel", host.name, "--vm-key", f"{vm.name}/vm.key")

    def export(self, vm: EmulatedVm, host: SecureProcessorHost) -> str:
        """Brings the VM's vTPM into a file, and gives its name."""
        file = f"{vm.name}.instance"
        self.run("export", str(vm.vm_id), file, "--channel", host.name)
        return file

    def attempt_import(self, vm: EmulatedVm, host: SecureProcessorHost, file: str) -> Outcome:
        """Makes the VM there with the vTPM out of the file."""
        key = f"{vm.name}/vm.key"
        return self.attempt("provision", str(vm.vm_id), "--channel", host.name, "--vm-key", key, "--import", file)
