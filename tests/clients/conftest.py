"""Fixtures for real clients."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import RunningSp


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place for sockets and files whose path is short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def shared_sp() -> Iterator[RunningSp]:
    """A running SP for all tests of a module; each test has a VM of its own."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path, RunningSp(Path(path) / "sp") as running:
        yield running
