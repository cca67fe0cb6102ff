"""A new platform: its directory, its configuration, its tables, its first administrator. The command line comes in."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from spvtpm.cloud import auth
from spvtpm.cloud.config import CONFIG_FILE, DEFAULT_TOML, CloudConfig, database_url
from spvtpm.cloud.database import Database
from spvtpm.cloud.migrations import migrate
from spvtpm.files import create_file
from spvtpm.wire.errors import AlreadyInitialised, StorageError
from spvtpm.wire.platform_api import MadeToken, NewToken

ADMINISTRATOR: Final = "admin"


def found_platform(directory: Path) -> MadeToken:
    """Makes a platform on SQLite. The configuration comes last: without it, what was begun can be begun again.

    Args:
        directory: made with mode 0700 if it is missing.

    Returns:
        A token of the first administrator.

    Raises:
        AlreadyInitialised: there is one.
        StorageError: it cannot be written.
    """
    configuration = directory / CONFIG_FILE
    if configuration.exists():
        raise AlreadyInitialised(f"{directory} has a platform already")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {directory}: {error.strerror}") from None
    database = Database(database_url(CloudConfig(), directory))
    try:
        migrate(database)
        with database.write() as connection:
            auth.add_user(connection, ADMINISTRATOR)
            made = auth.make_token(connection, ADMINISTRATOR, NewToken(scopes=["admin"], note="made by cloud init"))
    finally:
        database.close()
    create_file(configuration, DEFAULT_TOML.encode())
    return made
