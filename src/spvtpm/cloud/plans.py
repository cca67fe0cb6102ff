"""What each kind of operation needs and does: from which states, in which steps, under which word it ends. Pure.

The steps are carried out by `workflows.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from spvtpm.wire.errors import WrongState
from spvtpm.wire.platform_api import OperationKind, VmState

ORDERS_PER_OPERATION: Final = 4
"""Numbers that an operation reserves for its orders, beginning with its sequence."""

DOING: Final = 0
FINISHING: Final = 1
UNDOING: Final = 2
SWEEPING: Final = 3
"""Which of them an order has, so that who undoes, or sweeps up what neither could reach, is stronger than who does; `FINISHING`
has a VM go on at the host that it has moved to. The host that it has left forgets it by the strongest: nothing follows."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step.

    Attributes:
        name: by which `workflows.py` knows it.
        words: what is going on meanwhile.
    """

    name: str
    words: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One kind of operation.

    Attributes:
        states: of the VM, from which it may begin; empty: there is no VM yet.
        otherwise: what to do about a VM in another state.
        steps: in their order.
        event: the word for its good end.
    """

    states: frozenset[VmState]
    otherwise: str
    steps: tuple[PlannedStep, ...]
    event: str


_CHOOSE: Final = PlannedStep("choose-host", "choosing a host")
_GIVE: Final = PlannedStep("give-image", "giving the memory image to the host")
_DEFINE: Final = PlannedStep("define", "announcing the VM to its host")
_RUN: Final = PlannedStep("run", "booting the VM")
_TAKEN: Final = PlannedStep("see-taken", "checking that the secure processor has nothing of the VM any more")
_FORGET: Final = PlannedStep("forget", "telling the host to forget the VM")

PLANS: Final[dict[OperationKind, Plan]] = {
    "create": Plan(frozenset(), "", (_CHOOSE, _DEFINE), "created"),
    "place": Plan(frozenset({"away"}), "release it first", (_CHOOSE, _GIVE, _DEFINE), "placed"),
    "start": Plan(
        frozenset({"placed", "stopped", "failed"}),
        "one that is away has to be placed first, one that is hibernated to be resumed",
        (_RUN,),
        "started",
    ),
    "shutdown": Plan(
        frozenset({"running", "failed"}),
        "only one that runs can be shut down",
        (PlannedStep("stop", "shutting the VM down"),),
        "stopped",
    ),
    "hibernate": Plan(
        frozenset({"running"}),
        "only one that runs can be hibernated",
        (PlannedStep("hibernate", "hibernating the VM"),),
        "hibernated",
    ),
    "resume": Plan(
        frozenset({"placed", "hibernated"}),
        "one that is away has to be placed first, one that was shut down to be started",
        (PlannedStep("run", "resuming the VM"),),
        "resumed",
    ),
    "migrate": Plan(
        frozenset({"running"}),
        "only one that runs can move; the vTPM of another one moves with its owner: released here, placed there",
        (
            PlannedStep("choose-destination", "choosing a host to move to"),
            PlannedStep("depart", "opening the handoff at the VM's host"),
            PlannedStep("arrive", "having the other host expect the VM"),
            PlannedStep("carry", "moving the VM"),
            PlannedStep("go-on", "having the VM go on at its new host"),
        ),
        "migrated",
    ),
    "release": Plan(
        frozenset({"placed", "stopped", "hibernated", "failed"}),
        "one that runs has to be shut down or hibernated first, one that is away needs no host anyway",
        (_TAKEN, PlannedStep("fetch-image", "taking the memory image from the host"), _FORGET),
        "released",
    ),
    "destroy": Plan(
        frozenset({"placed", "running", "stopped", "hibernated", "failed", "away"}), "", (_TAKEN, _FORGET), "destroyed"
    ),
}


def verify_state(kind: OperationKind, name: str, state: str) -> None:
    """Whether an operation may begin.

    Args:
        kind: of the operation.
        name: of the VM.
        state: of the VM.

    Raises:
        WrongState: it may not; the sentence says from where it could.
    """
    plan = PLANS[kind]
    if state not in plan.states:
        raise WrongState(f"VM {name} is {state}, so {kind} cannot begin: {plan.otherwise}")
