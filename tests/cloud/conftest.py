"""Fixtures for tests of the platform's background work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.cloud.duties import Duties
from tests.cloud.agent_double import AgentDouble
from tests.cloud.platform_database import PlatformDatabase


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path is short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory:
        yield Path(directory)


@pytest.fixture(params=["sqlite", "postgresql"])
def platform(request: pytest.FixtureRequest, short_path: Path) -> Iterator[PlatformDatabase]:
    """The platform's database, of each kind."""
    on_sqlite = request.param == "sqlite"
    file = short_path / "platform.sqlite"
    database = PlatformDatabase(f"sqlite:///{file}" if on_sqlite else request.getfixturevalue("postgres").url)
    yield database
    database.close()


@pytest.fixture
def agent(platform: PlatformDatabase, short_path: Path) -> Iterator[AgentDouble]:
    """Host `h1`."""
    with AgentDouble(short_path / "h1.sock", "01" * 16) as double:
        platform.add_host("h1", double)
        yield double


@pytest.fixture
def other_agent(platform: PlatformDatabase, short_path: Path) -> Iterator[AgentDouble]:
    """Host `h2`."""
    with AgentDouble(short_path / "h2.sock", "02" * 16) as double:
        platform.add_host("h2", double)
        yield double


@pytest.fixture
def duties(platform: PlatformDatabase) -> Iterator[Duties]:
    """A replica in the test's own process; its patience is short."""
    running = Duties(platform.engine, replica="here", patience_s=1.0, look_every_s=0.1, taken_after_s=0.5)
    running.start()
    platform.submitted = running.wake
    yield running
    running.close()
