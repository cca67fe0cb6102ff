"""Fixtures that many tests share."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import RunningSp
from tests.postgres import PROGRAMS, Database, PostgresServer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Whoever has begun the tests in the background of a shell ignores Ctrl-C, and what they start would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def state_directory() -> Iterator[Path]:
    """A path for an SP's state that is short enough for unix sockets; does not exist yet."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory:
        yield Path(directory) / "sp"


@pytest.fixture
def sp(state_directory: Path) -> Iterator[RunningSp]:
    """A running SP of the test's own."""
    with RunningSp(state_directory) as running:
        yield running


@pytest.fixture(scope="session")
def _session_postgres() -> Iterator[PostgresServer]:
    if PROGRAMS is None:
        pytest.skip("PostgreSQL is not installed")
    with tempfile.TemporaryDirectory(prefix="spvtpm-pg-") as directory:
        Path(directory).chmod(0o711)  # if we are root, the server's user has to pass through
        server = PostgresServer(Path(directory) / "server", PROGRAMS)
        try:
            yield server
        finally:
            server.close()


@pytest.fixture
def postgres_server(_session_postgres: PostgresServer) -> Iterator[PostgresServer]:
    """A running PostgreSQL; whoever stops it may leave it so."""
    yield _session_postgres
    if not _session_postgres.is_running:
        _session_postgres.start()


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Iterator[Database]:
    """An empty database of the test's own."""
    database = postgres_server.new_database()
    yield database
    if not postgres_server.is_running:
        postgres_server.start()
    postgres_server.drop_database(database.name)
