"""A cloud platform that lies: it relays to real secure processors, and does one evil after the other. Trusted with nothing."""

from __future__ import annotations

import uuid

from msgspec.structs import replace

from spvtpm.wire.platform_api import OperationKind, Vm, VmState, Wants
from tests.harness import RunningSp
from tests.terminal.platform_double import PlatformDouble


class MaliciousPlatform(PlatformDouble):
    """Each attribute is an evil; without any, it is honest.

    Attributes:
        swapped: two VMs, each of which is told of under the other's name.
        swapped_ids: the same, but each is told of as if it had the other's id.
        hidden: VMs that it denies.
        leads_elsewhere: chips, by the chip that the relay leads to instead.
        places_at: the chip that it picks, whatever is wanted.
        claims_done: operations that it tells are done, and does not do.
        says_state: what it says of a VM's state.
        says_chip: which chip it says that a VM is at.
    """

    def __init__(self, sps: list[RunningSp]) -> None:
        self.swapped: tuple[uuid.UUID, uuid.UUID] | None = None
        self.swapped_ids: tuple[uuid.UUID, uuid.UUID] | None = None
        self.hidden: set[uuid.UUID] = set()
        self.leads_elsewhere: dict[str, str] = {}
        self.places_at: str | None = None
        self.claims_done: set[OperationKind] = set()
        self.says_state: dict[uuid.UUID, VmState] = {}
        self.says_chip: dict[uuid.UUID, str] = {}
        super().__init__(sps)

    def say(self, vm: Vm) -> Vm | None:
        if vm.vm_id in self.hidden:
            return None
        if self.swapped is not None and vm.vm_id in self.swapped:
            vm = replace(vm, name=self.vms[self._other(self.swapped, vm.vm_id)].name)
        if self.swapped_ids is not None and vm.vm_id in self.swapped_ids:
            vm = replace(self.vms[self._other(self.swapped_ids, vm.vm_id)], vm_id=vm.vm_id)
        vm = replace(vm, state=self.says_state.get(vm.vm_id, vm.state))
        return replace(vm, chip_id=self.says_chip.get(vm.vm_id, vm.chip_id))

    def pick(self, wants: Wants) -> str:
        return super().pick(wants) if self.places_at is None else self.places_at

    def lead(self, chip_id: str) -> RunningSp:
        return super().lead(self.leads_elsewhere.get(chip_id, chip_id))

    def carry_out(self, kind: OperationKind, vm: Vm) -> None:
        if kind not in self.claims_done:
            super().carry_out(kind, vm)
            return
        states: dict[OperationKind, VmState] = {
            "start": "running",
            "resume": "running",
            "shutdown": "stopped",
            "hibernate": "hibernated",
            "release": "away",
        }
        if kind in states:
            self.become(vm, states[kind])
        elif kind == "destroy":
            del self.vms[vm.vm_id]

    @staticmethod
    def _other(pair: tuple[uuid.UUID, uuid.UUID], vm_id: uuid.UUID) -> uuid.UUID:
        return pair[1] if vm_id == pair[0] else pair[0]
