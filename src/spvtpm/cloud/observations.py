"""What an agent's report of a VM means for the platform: pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uuid

    from spvtpm.wire.agent_api import VmReport
    from spvtpm.wire.platform_api import VmState


@dataclass(frozen=True, slots=True)
class Observation:
    """A VM as its host's agent has it.

    Attributes:
        state: what that is for the platform.
        failure: why it is not as it should be; empty: it is.
        vtpm_id: of its vTPM, if it has one.
        vtpm: where that lives; empty: there is none.
        boots: so far.
        is_taken: whether its owner has its vTPM, or has destroyed it: nothing of it is left that was there.
    """

    state: VmState
    failure: str
    vtpm_id: uuid.UUID | None
    vtpm: str
    boots: int
    is_taken: bool

    def columns(self) -> dict[str, Any]:
        """For the table `vms`."""
        return {
            "state": self.state,
            "failure": self.failure,
            "vtpm_id": self.vtpm_id,
            "vtpm": self.vtpm,
            "boots": self.boots,
        }


def observe(report: VmReport, known: VmState) -> Observation:
    """What a report means.

    Args:
        report: of the agent.
        known: the state so far; it stays where the report is of something that is still changing.
    """
    block = report.security_block
    vtpm = block.vtpm if block is not None else None
    state, failure = _state(report, known)
    return Observation(
        state=state,
        failure=failure,
        vtpm_id=vtpm.vtpm_id if vtpm is not None else None,
        vtpm=vtpm.residency if vtpm is not None else "",
        boots=block.boots if block is not None else 0,
        is_taken=block is None and report.want in {"running", "stopped", "hibernated"},
    )


def _state(report: VmReport, known: VmState) -> tuple[VmState, str]:
    block = report.security_block
    if report.failure:
        return "failed", report.failure
    if block is None:
        # Its owner took it, or has not provisioned it yet. Either way it waits for its owner, who says what follows.
        if report.want == "defined":
            return "placed", ""
        return ("stopped", "") if known == "running" and report.machine == "none" else (known, "")
    match block.state:
        case "damaged":
            return "failed", "its security block cannot be believed"
        case "failed":
            return "failed", (block.vtpm.failure if block.vtpm is not None else "") or "its boot failed"
        case "hibernated":
            return "hibernated", ""
        case "leaving" | "arriving":
            return known, ""
        case "running":
            return ("running", "") if report.machine == "running" else (known, "")
        case "stopped":
            if report.want == "defined":
                return "placed", ""
            return ("stopped", "") if report.machine == "none" and report.want != "running" else (known, "")
