"""The owners of the demo: their terminals, far away from platform and hosts, as the real command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spvtpm.demo.platform import CloudPlatform
from spvtpm.demo.stage import ActFailed, ChipVendor, Outcome, run_tool
from spvtpm.demo.story import Story
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.machines import Site
from spvtpm.terminal.owned import Account
from spvtpm.terminal.platform import Platform


class OwnerTerminal:
    """A keyring, and `spvtpm` with it.

    Args:
        name: `alice`; the prompt, and the directory of the keyring.
        directory: of the story.
        cloud: the platform that this user has VMs at.
        story: where commands are shown.
    """

    def __init__(self, name: str, directory: Path, cloud: CloudPlatform, story: Story) -> None:
        self.name = name
        self._directory = directory
        self._cloud = cloud
        self._story = story
        self._connection: Platform | None = None
        self.run("terminal", "init")

    def keyring(self) -> Keyring:
        """Whose secrets the demo looks for where they must not be."""
        return Keyring.open(self._directory / self.name / "spvtpm", lambda: b"")

    def platform(self) -> Platform:
        """This user's connection to the platform."""
        if self._connection is None:
            self._connection = Platform(self._account(self.keyring()))
        return self._connection

    def site(self) -> Site:
        """This user at the platform."""
        return Site(self.keyring(), self.platform())

    @contextmanager
    def connected(self) -> Iterator[Site]:
        """This user at the platform, over a connection of its own: for another thread."""
        keyring = self.keyring()
        with Platform(self._account(keyring)) as platform:
            yield Site(keyring, platform)

    def _account(self, keyring: Keyring) -> Account:
        if keyring.content.account is None:
            raise ActFailed(f"{self.name} is not logged in")
        return keyring.content.account

    def attempt(self, *words: str) -> Outcome:
        """Runs a command of `spvtpm`, and tells what the platform saw of it."""
        self._story.command(f"{self.name}$", ["spvtpm", *words])
        program = [sys.executable, "-m", "spvtpm.cli", *words]
        outcome = run_tool(program, self._directory, {"XDG_DATA_HOME": str(self._directory / self.name)})
        self._story.output(self._cloud.saw(), style="blue")
        return outcome

    def run(self, *words: str) -> Outcome:
        """As `attempt`, for what must succeed; shows what was said.

        Raises:
            ActFailed: it did not.
        """
        outcome = self.attempt(*words)
        if not outcome.ok:
            raise ActFailed(f"spvtpm {' '.join(words[:2])}: {outcome.complaint}")
        self._story.output([*outcome.remarks, *outcome.output.decode(errors="replace").splitlines()])
        return outcome

    def trust(self, vendor: ChipVendor) -> None:
        """Takes a vendor's root and revocation list for good."""
        self.run("terminal", "trust", f"{vendor.name}/root.pem", "--revoked", f"{vendor.name}/revoked.pem")

    def log_in(self) -> None:
        """Uses the platform from now on."""
        self.run("login", self._cloud.url, "--token-file", self._cloud.token(self.name))

    def close(self) -> None:
        """Ends the connection."""
        if self._connection is not None:
            self._connection.close()
