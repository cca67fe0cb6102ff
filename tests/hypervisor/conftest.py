"""Fixtures of the agent's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import RunningSp
from tests.hypervisor.running_agent import RunningAgent


@pytest.fixture
def agent(sp: RunningSp) -> Iterator[RunningAgent]:
    """A running agent of the test's own."""
    with RunningAgent(sp) as running:
        yield running
