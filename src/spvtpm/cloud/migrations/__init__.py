"""Brings a database to the tables of this release, and tells whether it is. Its revisions are alembic's, in `versions`.

A new revision: change `tables.py`, bring a database to what was before, then
`alembic.command.revision(alembic_config(connection), message="…", autogenerate=True)`, and read what it made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from spvtpm.cloud.database import Database
from spvtpm.wire.platform_errors import NotMigrated

_LOCK: Final = 0x7370_7674_706D  # "spvtpm"; of PostgreSQL's advisory locks


def alembic_config(connection: Connection) -> Config:
    """For alembic's commands on this connection."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def migrate(database: Database) -> None:
    """Brings the database to this release's tables: all of it or nothing. Of several at once, one does it.

    Raises:
        NotMigrated: the database is of a newer release.
        Unavailable: the database is away.
    """
    with database.write() as connection:  # SQLite: has the write lock
        if database.backend == "postgresql":
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config = alembic_config(connection)
        _verify_known(connection, ScriptDirectory.from_config(config))
        command.upgrade(config, "head")


def verify_migrated(connection: Connection) -> None:
    """Whether the database has this release's tables.

    Raises:
        NotMigrated: it has not.
    """
    script = ScriptDirectory.from_config(alembic_config(connection))
    _verify_known(connection, script)
    if _revisions(connection) != set(script.get_heads()):
        raise NotMigrated("the database has not the tables of this release")


def _verify_known(connection: Connection, script: ScriptDirectory) -> None:
    known = {revision.revision for revision in script.walk_revisions()}
    if not _revisions(connection) <= known:
        raise NotMigrated("the database has tables of a newer release")


def _revisions(connection: Connection) -> set[str]:
    return set(MigrationContext.configure(connection).get_current_heads())
