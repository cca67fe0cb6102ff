"""The cloud platform of the demo, as a real process; and what it saw of what went through it."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

from spvtpm.demo.stage import SPVTPM, ActFailed, SecureProcessorHost, end, run_tool, start
from spvtpm.demo.story import Story

_RELAYED = re.compile(
    r"relayed (?P<what>\w+) of (?:chip|VM) (?P<whose>[0-9a-f-]+), user (?P<user>\S+), host (?P<host>\S+): "
    r"to the host (?P<to>\d+) frames, (?P<to_bytes>\d+) bytes; from it (?P<back>\d+) frames, (?P<back_bytes>\d+) bytes"
)

_LINKED = re.compile(
    r"link \S+ from host (?P<source>\S+) to host (?P<destination>\S+): (?P<out>\d+) bytes, and (?P<back>\d+) back"
)


class CloudPlatform:
    """A platform on SQLite, on a unix socket.

    Args:
        directory: of the story.
        story: where commands are shown.
    """

    prompt = "cloud#"

    def __init__(self, directory: Path, story: Story) -> None:
        self.state = directory / "cloud"
        self.url = f"unix:{directory / 'cloud.sock'}"
        self.log = directory / "cloud.log"
        self._directory = directory
        self._story = story
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0
        self.relayed_bytes = 0

    def make(self) -> None:
        """Its database, without any user."""
        self._admin("init")
        (self.state / "cloud.toml").write_text(f'listen = "{self.url}"\n')

    def start(self) -> None:
        """Its process."""
        self._story.command(self.prompt, ["spvtpm", "cloud", "run", "cloud"])
        self._process = start(["cloud", "run", str(self.state)], self.log, b"listening")

    def add_host(self, host: SecureProcessorHost) -> None:
        """A host where VMs can go from now on."""
        address = f"unix:{host.agent_state / 'agent.sock'}"
        self._admin("add-host", host.name, address, "--token-file", str(host.agent_state / "token"))

    def token(self, user: str) -> str:
        """A token of a user, who is made if there is none: the name of a private file."""
        file = f"{user}.token"
        self._admin("add-user", user)
        self._admin("new-token", user, "--scope", "vms", "--output", file)
        return file

    def _admin(self, command: str, *words: str) -> None:
        self._story.command(self.prompt, ["spvtpm", "cloud", command, "cloud", *words])
        done = run_tool([*SPVTPM, "cloud", command, str(self.state), *words], self._directory, {})
        if not done.ok:
            raise ActFailed(f"spvtpm cloud {command}: {done.complaint}")

    def saw(self) -> list[str]:
        """What went through it since the last time: sizes, which is all that it has."""
        if self._process is None:
            return []
        text = self.log.read_text()
        new, self._read = text[self._read :], len(text)
        seen: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        for found in _RELAYED.finditer(new):
            counts = tuple(int(found[name]) for name in ("to", "to_bytes", "back", "back_bytes"))
            seen.setdefault((found["what"], found["host"]), []).append(counts)
        lines = [self._line(what, host, relays) for (what, host), relays in seen.items()]
        return [*lines, *(self._link(found) for found in _LINKED.finditer(new))]

    def _link(self, found: re.Match[str]) -> str:
        self.relayed_bytes += int(found["out"]) + int(found["back"])
        return (
            f"the platform carried a link between two chips: {found['out']} bytes from {found['source']} to "
            f"{found['destination']}, {found['back']} back"
        )

    def _line(self, what: str, host: str, relays: list[tuple[int, ...]]) -> str:
        to, to_bytes, back, back_bytes = (sum(column) for column in zip(*relays, strict=True))
        self.relayed_bytes += to_bytes + back_bytes
        name = f"a {what}" if len(relays) == 1 else f"{len(relays)} {what}s"
        return f"the platform saw {name}: {to} frames, {to_bytes} bytes to {host}; {back}, {back_bytes} bytes back"

    def stop(self) -> None:
        """In order."""
        end(self._process, signal.SIGTERM)
