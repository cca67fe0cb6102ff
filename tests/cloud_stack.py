"""A whole cloud in processes of its own, for tests end to end: platform replicas, hosts with secure processor and agent, users.

    with CloudStack(directory, hosts=2) as cloud:
        alice = cloud.user("alice")
        alice.run("vm", "create", "web")
        cloud.hosts[0].agent.kill()
        cloud.hosts[0].agent.start()

Everything a test does to a part is real: SIGKILL, a stop in order, another start on the same state. `up`'s own harness is
`tests/stack/`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec.structs import replace

from spvtpm.processor.daemon import initialise
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.machines import Site
from spvtpm.terminal.owned import Account
from spvtpm.terminal.platform import Platform
from spvtpm.vendor.authority import init_vendor, read_revocation_list
from spvtpm.vendor.factory import manufacture_chip
from tests.harness import RunningSp

SPVTPM = (sys.executable, "-m", "spvtpm.cli")
_PATIENCE_S = 120


def spvtpm(*words: str | Path, stdin: bytes = b"") -> bytes:
    """A command that must succeed; what it printed."""
    done = subprocess.run([*SPVTPM, *words], input=stdin, capture_output=True, timeout=_PATIENCE_S)
    assert done.returncode == 0, f"spvtpm {words}: exit code {done.returncode}\n{done.stderr.decode()}"
    return done.stdout


class Daemon:
    """An agent, or a replica of the platform, as a process. The first start comes with `start()`.

    Args:
        words: the command, behind `spvtpm`.
        log_path: what it says.
        environment: what it has there beside what we have.
    """

    def __init__(
        self, words: Sequence[str | Path], log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._words = tuple(words)
        self._environment = {**os.environ, **(environment or {})}
        self.log_path = log_path
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, and waits until it says that it listens."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*SPVTPM, *self._words], stdout=subprocess.PIPE, stderr=log, env=self._environment
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(b"listening on "), f"spvtpm {self._words} did not start:\n{self.log()}"

    def log(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text()

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self._reap()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        code = self.process.wait(_PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


class CloudHost:
    """A host: a secure processor and an agent.

    Args:
        name: at the platform.
        directory: of all that it has.
        vendor: whose chip it gets.
        agent_options: of `spvtpm agent init`.
    """

    def __init__(self, name: str, directory: Path, vendor: Path, *agent_options: str | Path) -> None:
        self.name = name
        chip = directory / f"{name}.chip"
        self.sp_state, self.agent_state = directory / f"{name}-sp", directory / f"{name}-ag"
        manufacture_chip(vendor, chip)
        initialise(self.sp_state, chip)
        self.sp = RunningSp(self.sp_state)
        listed = vendor / "revoked.pem"
        words = ["--sp", self.sp_state, "--revocation-list", listed, *agent_options, "--json"]
        made = spvtpm("agent", "init", self.agent_state, *words)
        self.address = str(json.loads(made)["address"])
        self.agent = Daemon(("agent", "run", self.agent_state), directory / f"{name}-agent.log")
        self.agent.start()

    @property
    def token_file(self) -> Path:
        """With what its agent wants to hear."""
        return self.agent_state / "token"

    def end(self) -> None:
        """Ends both, and the VMs."""
        if self.agent.is_running:
            self.agent.stop()
        self.sp.kill()


class CloudUser:
    """A user, with a keyring and the command line.

    Args:
        keyring: its directory; called `spvtpm`, as terminals look for it.
        token_file: with its token at the platform; None: it has none.
    """

    def __init__(self, keyring: Path, token_file: Path | None = None) -> None:
        self.keyring = keyring
        self.token_file = token_file

    def attempt(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """A command of `spvtpm` with this keyring; whatever comes of it."""
        return subprocess.run(
            [*SPVTPM, *words], input=stdin, capture_output=True, timeout=_PATIENCE_S, env=self._environment()
        )

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """A command that goes on meanwhile; what it says comes out of one pipe."""
        return subprocess.Popen(
            [*SPVTPM, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_DATA_HOME": str(self.keyring.parent)}

    def run(self, *words: str, stdin: bytes = b"") -> bytes:
        """As `attempt`, for what must succeed; what it printed."""
        done = self.attempt(*words, stdin=stdin)
        assert done.returncode == 0, f"spvtpm {words}: exit code {done.returncode}\n{done.stderr.decode()}"
        return done.stdout

    def run_json(self, *words: str) -> Any:
        """As `run`, with --json."""
        return json.loads(self.run(*words, "--json"))

    def use(self, url: str) -> None:
        """Goes to this replica from now on."""
        assert self.token_file is not None
        self.run("login", url, "--token-file", str(self.token_file))

    def account(self) -> Account:
        """The way to the platform, and the token."""
        account = Keyring.open(self.keyring, bytes).content.account
        assert account is not None
        return account

    @contextmanager
    def site(self, url: str | None = None, patience_s: float = 5.0) -> Iterator[Site]:
        """What the command line works with, in this process: for more commands than processes can be started for.

        Args:
            url: of another way to the platform than that of `use`.
            patience_s: how long a request is repeated while the platform is away.
        """
        keyring = Keyring.open(self.keyring, bytes)
        account = self.account()
        with Platform(replace(account, url=url or account.url), patience_s) as platform:
            yield Site(keyring, platform)


class CloudStack:
    """The whole.

    Args:
        directory: with a short name; must not exist.
        hosts: how many.
        replicas: of the platform; more than one need a database that they can share.
        database_url: of PostgreSQL; None: SQLite.
        environment: what replicas have there beside what we have.

    Attributes:
        hosts: by number, from 0: `host-0` first.
        replicas: the platform's processes.
        urls: of the replicas: unix sockets, which are the same after a restart.
    """

    def __init__(
        self,
        directory: Path,
        hosts: int = 1,
        replicas: int = 1,
        database_url: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.vendor = directory / "vendor"
        self.hosts: list[CloudHost] = []
        self.replicas: list[Daemon] = []
        self.urls: list[str] = []
        self._database_url = database_url
        self._environment = environment
        self._ends = ExitStack()
        directory.mkdir(mode=0o711)
        with ExitStack() as cleanup:
            cleanup.callback(self.close)
            init_vendor(self.vendor, "Example Silicon")
            for number in range(replicas):
                self._make_replica(number)
            for _ in range(hosts):
                self.add_host()
            for replica in self.replicas:
                replica.start()
            cleanup.pop_all()

    def add_host(self, *agent_options: str | Path) -> CloudHost:
        """One more host, known to the platform.

        Args:
            agent_options: of `spvtpm agent init`.
        """
        host = CloudHost(f"host-{len(self.hosts)}", self.directory, self.vendor, *agent_options)
        self._ends.callback(host.end)
        self.hosts.append(host)
        self.admin("add-host", host.name, host.address, "--token-file", host.token_file)
        return host

    def _make_replica(self, number: int) -> None:
        state = self.directory / f"cloud-{number}"
        spvtpm("cloud", "init", state, "--output", self.directory / f"admin-{number}.token")
        socket = f"unix:{self.directory / f'cloud-{number}.sock'}"
        lines = [f"listen = {json.dumps(socket)}"]
        if self._database_url is not None:
            lines.append(f"database_url = {json.dumps(self._database_url)}")
        (state / "cloud.toml").write_text("\n".join(lines) + "\n")
        if number == 0:
            spvtpm("cloud", "migrate", state)
        replica = Daemon(("cloud", "run", state), self.directory / f"cloud-{number}.log", self._environment)
        self._ends.callback(replica.kill)
        self.replicas.append(replica)
        self.urls.append(socket)

    def admin(self, command: str, *words: str | Path) -> bytes:
        """A command of the platform's administrator."""
        return spvtpm("cloud", command, self.directory / "cloud-0", *words)

    def token(self, user: str, *scopes: str) -> Path:
        """A new token of a user that is made if it is missing, as a private file."""
        self.admin("add-user", user)
        path = self.directory / f"{user}-{os.urandom(4).hex()}.token"
        words = [word for scope in scopes for word in ("--scope", scope)]
        self.admin("new-token", user, *words, "--output", path)
        return path

    def user(self, name: str, replica: int = 0, scopes: tuple[str, ...] = ("vms",)) -> CloudUser:
        """A new user, logged in at a replica, with a keyring that trusts the vendor."""
        user = CloudUser(self.keyring(name).directory, self.token(name, *scopes))
        user.use(self.urls[replica])
        return user

    def keyring(self, name: str) -> Keyring:
        """A new keyring that trusts the vendor, and knows no platform."""
        keyring = Keyring.create(self.directory / name / "spvtpm")
        root = x509.load_pem_x509_certificate((self.vendor / "root.pem").read_bytes())
        keyring.trust_root(root.public_bytes(Encoding.DER))
        keyring.put_revocation_list(read_revocation_list(self.vendor).crl.public_bytes(Encoding.DER))
        return keyring

    def close(self) -> None:
        """Ends all of it."""
        self._ends.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
