"""All emulated VMs of a host: what makes their machines, and finds those that an earlier agent has left."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path

from spvtpm.hypervisor.emulated_vm import EmulatedVm
from spvtpm.hypervisor.machine_process import find_machines
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.errors import StorageError

log = logging.getLogger(__name__)


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
        try:
            directory.mkdir(mode=0o711, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {directory}: {error.strerror}") from None

    def machine(self, vm_id: uuid.UUID, on_end: Callable[[], None]) -> EmulatedVm:
        """The machine of a VM; nothing runs yet."""
        directory = self._directory / str(vm_id)
        left = self._left.pop(directory / "machine", None)
        return EmulatedVm(vm_id, directory, self._users, on_end, left)

    def known(self) -> set[uuid.UUID]:
        """The VMs of which the host has anything."""
        found = set()
        for path in self._directory.iterdir():
            try:
                found.add(uuid.UUID(path.name))
            except ValueError:
                log.warning("%s is no VM's", path)
        return found
