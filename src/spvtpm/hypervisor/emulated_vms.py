"""All emulated VMs of a host: what makes their machines, and finds those that an earlier agent has left."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from spvtpm.hypervisor.emulated_vm import EmulatedVm
from spvtpm.hypervisor.machine_process import find_machines
from spvtpm.hypervisor.process_machine import make_directory, vms_in
from spvtpm.hypervisor.vm_users import VmUsers


class EmulatedVms:
    """All emulated VMs of a host. A `MachineDriver`.

    Args:
        directory: of the VMs, absolute.
        users: whose processes machines are.

    Raises:
        StorageError: the directory cannot be used.
    """

    def __init__(self, directory: Path, users: VmUsers) -> None:
        self._directory = directory
        self._users = users
        self._left = find_machines("machine")
        make_directory(directory)

    def machine(self, vm_id: uuid.UUID, on_end: Callable[[], None]) -> EmulatedVm:
        """The machine of a VM; nothing runs yet."""
        directory = self._directory / str(vm_id)
        left = self._left.pop(directory / "machine", None)
        return EmulatedVm(vm_id, directory, self._users, on_end, left)

    def known(self) -> set[uuid.UUID]:
        """The VMs of which the host has anything."""
        return vms_in(self._directory)
