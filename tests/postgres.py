"""A real PostgreSQL for tests: a private server of the newest installed version, and fresh databases in it.

The fixtures are in `conftest.py`: `postgres`, a database of the test's own, and `postgres_server`, for tests that stop it.
"""

from __future__ import annotations

import itertools
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 60
_SUPERUSER = "spvtpm"

_CONFIGURATION = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{directory}'
fsync = on
max_connections = 200
max_prepared_transactions = 0
shared_buffers = 32MB
logging_collector = off
"""


def _programs() -> Path | None:
    """Where `initdb` and `pg_ctl` are: Debian keeps them apart for each version; the newest counts."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


PROGRAMS = _programs()


class PostgresServer:
    """A server of the tests' own, on a port of this machine alone. Durable, as a real one: `fsync` is on.

    Args:
        directory: made here, for the user who runs the server; PostgreSQL refuses root.
        programs: where `pg_ctl` is.
    """

    def __init__(self, directory: Path, programs: Path) -> None:
        self._programs = programs
        self._directory = directory
        self._data = directory / "data"
        self._numbers = itertools.count(1)
        self._password = secrets.token_urlsafe()
        self._user = "postgres" if os.geteuid() == 0 else None
        directory.mkdir(mode=0o700)
        if self._user is not None:
            shutil.chown(directory, self._user)
        self._init()
        self.port = _free_port()
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(_CONFIGURATION.format(port=self.port, directory=directory))
        self.start()

    def _init(self) -> None:
        password = self._directory / "password"
        password.write_text(self._password)
        words = ("--username", _SUPERUSER, "--auth", "scram-sha-256", "--pwfile", password, "--encoding", "UTF8")
        self._run("initdb", "--pgdata", self._data, *words)

    def start(self) -> None:
        """Starts it, and waits until it takes connections."""
        self._run("pg_ctl", "start", "--wait", "--pgdata", self._data, "--log", self._directory / "log")

    def stop(self, mode: str = "fast") -> None:
        """Stops it.

        Args:
            mode: `fast` ends every session in order; `immediate` is a power loss, after which it recovers.
        """
        self._run("pg_ctl", "stop", "--wait", "--pgdata", self._data, "--mode", mode)

    @property
    def is_running(self) -> bool:
        """Whether it takes connections."""
        with socket.socket() as knock:
            return knock.connect_ex(("127.0.0.1", self.port)) == 0

    def new_database(self) -> Database:
        """An empty database."""
        name = f"test{next(self._numbers)}"
        self._run("createdb", *self._where(), name)
        return Database(self, name)

    def url(self, database: str) -> str:
        """For the platform, as its administrator writes it."""
        return f"postgresql://{_SUPERUSER}:{self._password}@127.0.0.1:{self.port}/{database}"

    def drop_database(self, name: str) -> None:
        """Removes one, whoever is still connected."""
        self._run("dropdb", "--force", *self._where(), name)

    def query(self, database: str, sql: str) -> str:
        """What `psql` prints for a statement, unadorned."""
        where = (*self._where(), "--dbname", database)
        return self._run("psql", *where, "--no-psqlrc", "--tuples-only", "--no-align", "--command", sql)

    def _where(self) -> tuple[str, ...]:
        return ("--host", str(self._directory), "--port", str(self.port), "--username", _SUPERUSER)

    def _run(self, program: str, *words: str | Path) -> str:
        command = [self._programs / program, *words]
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            command = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups", *command]
        # Not a pipe for the output: the server inherits it, and it would stay open.
        with tempfile.TemporaryFile("w+") as said:
            code = subprocess.run(
                command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=_PATIENCE_S,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PGPASSWORD": self._password},
            ).returncode
            said.seek(0)
            output = said.read()
        assert code == 0, f"{program}: {output}\n{self.log()[-2000:]}"
        return output

    def log(self) -> str:
        """What the server has logged so far."""
        path = self._directory / "log"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        """Ends it, without a care for what is in it."""
        if self.is_running:
            self.stop("immediate")


@dataclass(frozen=True)
class Database:
    """One database.

    Attributes:
        server: where it is.
        name: its name.
    """

    server: PostgresServer
    name: str

    @property
    def url(self) -> str:
        """As the platform takes it; with the password."""
        return self.server.url(self.name)

    def query(self, sql: str) -> str:
        """What `psql` prints for a statement, unadorned."""
        return self.server.query(self.name, sql)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
