"""Fixtures of the VM's side. How Hypothesis runs here: no test is judged by the clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.guest.running_machine import RunningMachine
from tests.harness import RunningSp

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture
def machine(sp: RunningSp) -> Iterator[RunningMachine]:
    """An emulated VM that runs, with a vTPM."""
    with RunningMachine(sp) as machine:
        machine.begin()
        yield machine
