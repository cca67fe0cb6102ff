"""Fixtures that many tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import RunningSp


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
