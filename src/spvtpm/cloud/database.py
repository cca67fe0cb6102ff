"""The platform's database: SQLite or PostgreSQL. Every part of the platform comes in for its connections.

A database that is away, or locked for too long, is `Unavailable`, and is used again as soon as it is back.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
)
from sqlalchemy.exc import (
    TimeoutError as PoolTimeout,
)

from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import ConfigError
from spvtpm.wire.platform_errors import Unavailable

CONNECTIONS: Final = 32
"""Of one process at most: more than threads that use them."""

_CONNECT_S: Final = 5
_LOCKED_S: Final = 5
_STATEMENT_S: Final = 30
_READS: Final = "spvtpm_reads"
_BACKENDS: Final = ("sqlite", "postgresql")

logger = logging.getLogger(__name__)


class Database:
    """The database at a URL. Threads may share it. `close()` ends it.

    Attributes:
        engine: gives connections; those that are not said to read only have SQLite's write lock from their begin on.
        url: with the password: a secret.
    """

    def __init__(self, url: str) -> None:
        """
        Args:
            url: as SQLAlchemy has it: `sqlite:////path` or `postgresql+psycopg://…`.

        Raises:
            ConfigError: it is no URL of a database that is known here.
        """
        self.url = url
        parsed = _parse(url)
        self.backend = parsed.get_backend_name()
        self.engine: Engine = create_engine(
            parsed,
            pool_size=CONNECTIONS // 4,
            max_overflow=CONNECTIONS - CONNECTIONS // 4,
            pool_timeout=_CONNECT_S,
            pool_pre_ping=True,
            hide_parameters=True,  # tokens of hosts are among them
            connect_args=_CONNECT_ARGUMENTS[self.backend],
        )
        if self.backend == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._readers = self.engine.execution_options(**{_READS: True})

    def __repr__(self) -> str:
        return f"Database({self.backend})"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection in a transaction that only reads.

        Raises:
            Unavailable: the database is away.
        """
        with _translated(), self._readers.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A connection in a transaction; committed at the end, undone by an exception.

        Raises:
            Unavailable: the database is away, or locked. Whether a commit was done is unknown if that was lost.
        """
        with _translated(), self.engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Ends all connections that are not in use."""
        self.engine.dispose()


def is_away(error: DBAPIError) -> bool:
    """Whether an error is of the database's being away or busy, and not of what it was asked."""
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError | InternalError)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except PoolTimeout:
        raise Unavailable("all connections to the platform's database are in use") from None
    except DBAPIError as error:
        if not is_away(error):
            raise
        lines = printable(" ".join(str(error.orig).split()))  # of the driver: it names host and user, never a password
        logger.warning("the database cannot be used: %s", lines[:500])
        raise Unavailable("the platform's database is away or busy") from None


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError("the database's URL is none") from None  # it is not quoted: it may contain a password
    if parsed.get_backend_name() not in _BACKENDS:
        raise ConfigError("the database's URL begins neither with sqlite: nor with postgresql+psycopg:")
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in {None, "", ":memory:"}:
            raise ConfigError("the database's URL names no file: a database in memory would be gone with its process")
        return parsed
    return parsed.set(drivername="postgresql+psycopg")


_CONNECT_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "sqlite": {"timeout": _LOCKED_S, "check_same_thread": False},
    "postgresql": {
        "connect_timeout": _CONNECT_S,
        "application_name": "spvtpm",
        "keepalives_idle": 10,  # seconds; keepalives_interval follows
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,  # milliseconds
        "options": f"-c lock_timeout={_LOCKED_S}s -c statement_timeout={_STATEMENT_S}s"
        " -c idle_in_transaction_session_timeout=60s",
    },
}


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions begin in `_begin_sqlite`, and not before the first write
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}").close()


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that reads first and writes then would fail at once if another has written in between."""
    reads = connection.get_execution_options().get(_READS, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
