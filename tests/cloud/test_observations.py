"""What an agent's report of a VM means for the platform."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from spvtpm.cloud.observations import observe
from spvtpm.wire.agent_api import VmReport
from spvtpm.wire.messages import VmInfo, VtpmInfo
from spvtpm.wire.platform_api import VmState

VM = uuid.UUID(int=7)
VTPM = VtpmInfo(vtpm_id=uuid.UUID(int=8), residency="off")


def report(want: Any, block: Any, machine: Any = "none", failure: str = "") -> VmReport:
    """Of a VM."""
    return VmReport(
        vm_id=VM,
        sequence=1,
        want=want,
        machine=machine,
        security_block=None if block is None else VmInfo(vm_id=VM, state=block, boots=3, vtpm=VTPM),
        image=False,
        failure=failure,
    )


@pytest.mark.parametrize(
    ("said", "known", "state", "is_taken"),
    [
        (report("defined", None), "placed", "placed", False),
        (report("defined", "stopped"), "placed", "placed", False),
        (report("defined", "hibernated"), "placed", "hibernated", False),
        (report("running", "running", "running"), "placed", "running", False),
        (report("running", "running", "changing"), "stopped", "stopped", False),
        (report("running", "stopped", "none"), "running", "running", False),
        (report("stopped", "stopped"), "running", "stopped", False),
        (report("stopped", "running", "changing"), "running", "running", False),
        (report("hibernated", "hibernated"), "running", "hibernated", False),
        (report("stopped", None), "stopped", "stopped", True),
        (report("hibernated", None), "hibernated", "hibernated", True),
        (report("running", None), "running", "stopped", True),
        (report("running", None, "running"), "running", "running", True),
        (report("running", "damaged"), "running", "failed", False),
        (report("running", "failed"), "running", "failed", False),
        (report("running", "stopped", failure="no memory"), "running", "failed", False),
    ],
)
def test_a_report_has_one_meaning(said: VmReport, known: VmState, state: str, is_taken: bool) -> None:
    seen = observe(said, known)
    assert (seen.state, seen.is_taken) == (state, is_taken)
    assert bool(seen.failure) == (state == "failed")
    assert seen.vtpm == ("" if said.security_block is None else "off")
