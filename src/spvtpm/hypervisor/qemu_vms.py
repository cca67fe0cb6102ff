"""All QEMU guests of a host: what makes their machines, and finds those that an earlier agent has left."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path

from spvtpm.hypervisor.config import QemuConfig
from spvtpm.hypervisor.machine_process import find_machines
from spvtpm.hypervisor.process_machine import make_directory, vms_in
from spvtpm.hypervisor.qemu_command import MARK
from spvtpm.hypervisor.qemu_vm import QemuVm
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.errors import ConfigError

log = logging.getLogger(__name__)


class QemuVms:
    """All QEMU guests of a host. A `MachineDriver`.

    Args:
        directory: of the VMs, absolute; images are named from the agent's, which is above it.
        users: whose processes machines are.
        config: of QEMU.

    Raises:
        ConfigError: its path has a comma, and could not be found again in a command line of QEMU's.
        StorageError: the directory cannot be used.
    """

    def __init__(self, directory: Path, users: VmUsers, config: QemuConfig) -> None:
        self._directory = directory
        self._users = users
        self._config = config
        self._left = find_machines(MARK)
        if "," in str(directory):
            raise ConfigError(f"{directory} has a comma in it: QEMU's machines could not be told apart")
        if config.firmware and config.tpm == "direct":
            log.warning("guests' firmware measures nothing: on the direct path it finds no TPM")
        make_directory(directory)

    def machine(self, vm_id: uuid.UUID, on_end: Callable[[], None]) -> QemuVm:
        """The machine of a VM; nothing runs yet."""
        directory = self._directory / str(vm_id)
        left = self._left.pop(directory / "machine", None)
        return QemuVm(vm_id, directory, self._users, on_end, self._config, left)

    def known(self) -> set[uuid.UUID]:
        """The VMs of which the host has anything."""
        return vms_in(self._directory)
