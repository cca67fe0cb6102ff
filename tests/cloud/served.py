"""A replica of the platform as a process, for tests of what it serves; and an agent that only has WebSockets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection, unix_connect
from websockets.sync.server import Server, ServerConnection, unix_serve

from spvtpm.cloud import auth, host_addresses, tables
from spvtpm.cloud.database import Database
from spvtpm.wire.agent_api import HostReport
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.platform_api import HostAddress, NewToken, Scope
from spvtpm.wire.problems import Problem, problem_of
from tests.cloud.agent_double import PAPERS, TOKEN

_PATIENCE_S = 60
REPORT = HostReport(
    chip_id="0a" * 16,
    firmware=7,
    software="0.1.0",
    max_vms=4,
    vms=0,
    active=0,
    parked=0,
    missing_protection=[],
    papers=PAPERS,
)


class ServedPlatform:
    """A replica on a unix socket. `limits` and the URL go into its configuration."""

    def __init__(self, directory: Path, url: str | None = None, limits: Mapping[str, float] | None = None) -> None:
        self.directory = directory
        self.socket = directory.parent / f"{directory.name}.sock"
        self.log_path = directory.parent / f"{directory.name}.log"
        self.admin_token = json.loads(self.command("init", "--json"))["secret"]
        lines = [f"listen = {json.dumps(f'unix:{self.socket}')}"]
        if url is not None:
            lines.append(f"database_url = {json.dumps(url)}")
        lines += ["[limits]", *(f"{name} = {value}" for name, value in (limits or {}).items())]
        (directory / "cloud.toml").write_text("\n".join(lines) + "\n")
        self.database = Database(url or f"sqlite:///{directory / 'platform.sqlite'}")
        if url is not None:
            self.command("migrate")
            self.admin_token = self.token("admin", "admin")
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, word: str, *words: str) -> bytes:
        """`spvtpm cloud …` on this platform."""
        command = [sys.executable, "-m", "spvtpm.cli", "cloud", word, str(self.directory), *words]
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def start(self) -> None:
        """Starts it; returns once it listens."""
        command = [sys.executable, "-m", "spvtpm.cli", "cloud", "run", str(self.directory)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(b"listening on "), self.log()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(_PATIENCE_S)
        self.process.stdout.close()
        self.process = None
        return code

    def log(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text()

    def token(self, user: str, *scopes: Scope, expires_s: float | None = None) -> str:
        """A new token of a user, who is made if missing."""
        with self.database.write() as connection:
            auth.add_user(connection, user)
            return auth.make_token(connection, user, NewToken(scopes=list(scopes), expires_s=expires_s)).secret

    def add_host(self, name: str, address: str, report: HostReport = REPORT) -> None:
        """A host that has been heard of: nobody has to ask its agent first."""
        with self.database.write() as connection:
            host_addresses.set_host(connection, name, HostAddress(address=address, token=TOKEN))
            values = {"chip_id": report.chip_id, "report": msgspec.to_builtins(report)}
            connection.execute(tables.hosts.update().where(tables.hosts.c.name == name).values(values))

    def client(self, token: str | None) -> httpx.Client:
        """An HTTP client of a user; to be closed."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://platform", headers=headers, timeout=_PATIENCE_S)

    def websocket(self, path: str, token: str | None) -> ClientConnection:
        """A WebSocket of a user; to be closed."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return unix_connect(
            str(self.socket), f"ws://platform{path}", additional_headers=headers, compression=None, max_size=1 << 20
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            assert self.stop() == 0, self.log()
        self.database.close()


class RelayAgent:
    """An agent that has nothing but WebSockets; `serve` does what a test wants with each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.serve: Callable[[ServerConnection], None] = echo
        self.refusal: SpvtpmError | None = None
        self.asked: list[tuple[str, str | None]] = []
        self._server: Server = unix_serve(self._serve, str(path), process_request=self._admit, compression=None)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def address(self) -> str:
        """For the platform."""
        return f"unix:{self.path}"

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        self.asked.append((request.path, request.headers.get("Authorization")))
        if self.refusal is None:
            return None
        problem = problem_of(self.refusal)
        return connection.respond(HTTPStatus(problem.status), msgspec.json.encode(problem).decode())

    def _serve(self, connection: ServerConnection) -> None:
        self.serve(connection)

    def close(self) -> None:
        """Ends."""
        self._server.shutdown()
        self._thread.join()


def echo(connection: ServerConnection) -> None:
    """Sends back what comes."""
    for message in connection:
        connection.send(message)


def problem(response: httpx.Response) -> Problem:
    """The problem that a response must be."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    found = msgspec.json.decode(response.content, type=Problem)
    assert found.status == response.status_code
    return found


def new_vm(name: str = "web", **more: Any) -> dict[str, Any]:
    """The body of a request for a new VM."""
    return {"vm_id": str(uuid.uuid4()), "name": name, **more}
