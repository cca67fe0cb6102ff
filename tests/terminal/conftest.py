"""Estates: an owner with one chip, or with two, for all tests of a module."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.terminal.estate import Estate


def _estate(chips: int) -> Iterator[Estate]:
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory:
        estate = Estate(Path(directory), chips)
        try:
            yield estate
        finally:
            estate.close()


@pytest.fixture(scope="module")
def estate() -> Iterator[Estate]:
    """An owner and two chips of one fleet."""
    yield from _estate(2)
