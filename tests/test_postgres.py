"""The tests' own PostgreSQL is a real one: it keeps what was committed, and lets nobody in without the password."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from tests.postgres import Database


def test_a_database_that_was_away_has_what_was_committed(postgres: Database) -> None:
    engine = create_engine(postgres.url)
    try:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE kept (number integer)"))
            connection.execute(text("INSERT INTO kept VALUES (7)"))
        postgres.server.stop("immediate")
        engine.dispose()
        with pytest.raises(OperationalError, match="refused"):
            engine.connect()
        postgres.server.start()
        assert postgres.query("SELECT number FROM kept") == "7\n"
    finally:
        engine.dispose()


def test_each_test_has_an_empty_database(postgres: Database) -> None:
    assert postgres.query("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0\n"


def test_nobody_comes_in_without_the_password(postgres: Database) -> None:
    user, _, rest = postgres.url.rpartition("@")
    engine = create_engine(f"{user.rpartition(':')[0]}:wrong@{rest}")
    with pytest.raises(OperationalError, match="password"):
        engine.connect()
