"""The database: tables as the release wants them, of both kinds; away, it is unavailable, and back it is used again."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from spvtpm.cloud import auth, tables
from spvtpm.cloud.config import CloudConfig, Limits, database_url, load_config, parse_listen
from spvtpm.cloud.database import Database
from spvtpm.cloud.migrations import alembic_config, migrate, verify_migrated
from spvtpm.wire.errors import ConfigError
from spvtpm.wire.platform_errors import NotMigrated, Unavailable
from tests.postgres import Database as PostgresDatabase
from tests.postgres import PostgresServer

PASSWORD = "dont-tell"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of each kind."""
    on_sqlite = request.param == "sqlite"
    found = Database(f"sqlite:///{tmp_path}/p.sqlite" if on_sqlite else request.getfixturevalue("postgres").url)
    yield found
    found.close()


def test_migrations_make_exactly_the_tables_of_this_release(database: Database) -> None:
    with database.read() as connection, pytest.raises(NotMigrated):
        verify_migrated(connection)
    migrate(database)
    with database.write() as connection:
        command.check(alembic_config(connection))
        verify_migrated(connection)
        connection.execute(text("ALTER TABLE events ADD COLUMN stray INTEGER"))
        with pytest.raises(Exception, match="stray"):  # or the check would find nothing
            command.check(alembic_config(connection))


def test_of_several_migrations_at_once_one_does_it(database: Database) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            migrate(database)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with database.read() as connection:
        verify_migrated(connection)


def test_a_database_of_a_newer_release_is_left_alone(database: Database) -> None:
    migrate(database)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'later'"))
    with pytest.raises(NotMigrated, match="newer"):
        migrate(database)
    with database.read() as connection, pytest.raises(NotMigrated, match="newer"):
        verify_migrated(connection)


def test_names_are_ordered_by_their_bytes(database: Database) -> None:
    migrate(database)
    names = ["a-b", "a1", "aa", "ab", "b"]
    with database.write() as connection:
        for name in reversed(names):
            auth.add_user(connection, name)
        assert list(connection.scalars(select(tables.users.c.name).order_by(tables.users.c.name))) == sorted(names)


def test_what_refers_to_nothing_is_refused(database: Database) -> None:
    migrate(database)
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(tables.console_sessions.insert().values(sha256=b"x", token_id=uuid.uuid4(), expires_s=0))


def test_a_locked_sqlite_is_unavailable_until_it_is_free(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/p.sqlite"
    holder, other = Database(url), Database(url)
    migrate(holder)
    with other.read() as connection:
        connection.execute(text("PRAGMA busy_timeout = 10")).close()
    with holder.write() as connection:
        auth.add_user(connection, "alice")
        with pytest.raises(Unavailable), other.write():
            pass
        with other.read() as reader:  # readers go on
            assert not reader.scalars(select(tables.users.c.name)).all()
    with other.write() as connection:
        auth.add_user(connection, "bob")
    holder.close()
    other.close()


def test_a_postgresql_that_is_away_is_unavailable_until_it_is_back(
    postgres: PostgresDatabase, postgres_server: PostgresServer
) -> None:
    database = Database(postgres.url)
    migrate(database)
    postgres_server.stop("immediate")
    with pytest.raises(Unavailable), database.read() as connection:
        connection.execute(select(tables.users))
    postgres_server.start()
    with database.write() as connection:
        auth.add_user(connection, "alice")
    database.close()


@pytest.mark.attack("A24")
def test_the_databases_password_is_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    url = f"postgresql://user:{PASSWORD}@127.0.0.1:1/none"
    assert PASSWORD in url
    database = Database(url)
    with pytest.raises(Unavailable) as away, database.read():
        pass
    assert caplog.records
    wrong = []
    for bad in (f"mysql://user:{PASSWORD}@host/x", f"postgresql://user:{PASSWORD}@host:port/x", f":{PASSWORD}"):
        with pytest.raises(ConfigError) as refused:
            Database(bad)
        wrong.append(str(refused.value))
    config = CloudConfig(database_url=url)
    for told in (caplog.text, str(away.value), repr(database), repr(config), *wrong):
        assert PASSWORD not in told
    database.close()


# Configuration


def test_the_url_comes_from_the_file_or_the_environment_but_not_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "postgresql://somewhere")
    assert database_url(CloudConfig(), tmp_path) == f"sqlite:///{tmp_path}/platform.sqlite"
    assert database_url(CloudConfig(database_url="sqlite:////x"), tmp_path) == "sqlite:////x"
    assert database_url(CloudConfig(database_url_variable="PLACE"), tmp_path) == "postgresql://somewhere"
    with pytest.raises(ConfigError, match="both"):
        database_url(CloudConfig(database_url="x", database_url_variable="PLACE"), tmp_path)
    with pytest.raises(ConfigError, match="ELSEWHERE"):
        database_url(CloudConfig(database_url_variable="ELSEWHERE"), tmp_path)


@pytest.mark.parametrize(
    "text", ["unknown = 1", "[limits]\nrelays = 0", "listen = 1", "\xff", "database_url = 'secret'\n?"]
)
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cloud.toml"
    path.write_bytes(text.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path)
    assert "secret" not in str(refused.value)


def test_a_configuration_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cloud.toml"
    path.write_text("[limits]\nrelays = 3")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        load_config(tmp_path)
    path.chmod(0o600)
    assert load_config(tmp_path).limits == Limits(relays=3)


@pytest.mark.parametrize(
    ("listen", "meant"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:0", ("::1", 0)),
        ("host.example:65535", ("host.example", 65535)),
        ("unix:/run/x.sock", Path("/run/x.sock")),
    ],
)
def test_where_to_listen_is_understood(listen: str, meant: object) -> None:
    assert parse_listen(listen) == meant


@pytest.mark.parametrize("listen", ["", "80", "host:", "host:65536", "unix:x", "::1:80", f"unix:/{'x' * 200}"])
def test_where_nobody_can_listen_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError):
        parse_listen(listen)
