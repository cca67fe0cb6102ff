"""Every client scenario gives the same results whether or not the vTPM is parked and woken after every single command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.scenarios import SCENARIOS, Scenario
from tests.clients.served import served
from tests.clients.tools import Tools
from tests.harness import RunningSp


def transcript_of(scenario: Scenario, sp: RunningSp, directory: Path, *, parks: bool) -> list[tuple[int, int]]:
    directory.mkdir()
    with served(sp, directory, parks=parks) as (tcti, vtpm):
        scenario(Tools(tcti, directory))
    return vtpm.transcript


@pytest.mark.claim("C9")
@pytest.mark.claim("B6")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_clients_cannot_tell_a_parked_vtpm_from_an_active_one(
    scenario: Scenario, shared_sp: RunningSp, directory: Path
) -> None:
    active = transcript_of(scenario, shared_sp, directory / "active", parks=False)
    parked = transcript_of(scenario, shared_sp, directory / "parked", parks=True)

    assert active
    assert parked == active
