"""Fixtures of the tests between secure processors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processor.migration.two_chips import TwoChips


@pytest.fixture(scope="module")
def chips() -> Iterator[TwoChips]:
    """Two chips of one fleet, for the tests of a module."""
    with TwoChips() as it:
        yield it
