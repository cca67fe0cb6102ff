"""Which users' processes may command the SP, and which may have what belongs to a VM."""

from __future__ import annotations

from dataclasses import dataclass

from spvtpm.processor.security_block import VmSecurityBlock
from spvtpm.processor.vtpm_services import Boot
from spvtpm.wire.errors import PermissionRefused


@dataclass(frozen=True, slots=True)
class Users:
    """User ids.

    Attributes:
        commanding: may command, and have what belongs to VMs without users of their own.
        of_vms: belong to VMs.
    """

    commanding: frozenset[int]
    of_vms: range

    def check(self, vm_uid: int | None) -> None:
        """Whether a VM's process may be this user's.

        Raises:
            PermissionRefused: not here.
        """
        if vm_uid is not None and vm_uid not in self.of_vms and vm_uid not in self.commanding:
            raise PermissionRefused(f"user {vm_uid} is no user of VMs: `vm_uids` in the configuration names them")

    def of(self, block: VmSecurityBlock) -> frozenset[int]:
        """Whose processes may have the interface and the launch secret of the boot under way."""
        return self.commanding if block.vm_uid is None else frozenset([block.vm_uid])

    def boot_of(self, block: VmSecurityBlock) -> Boot:
        """The boot under way, for the VM's vTPM."""
        assert block.boot_id is not None  # noqa: S101  # a running block has one
        return Boot(block.boot_id, block.boot_key(), self.of(block), block.emulated)

    @property
    def others_come(self) -> bool:
        """Whether VMs may have users of their own."""
        return len(self.of_vms) > 0
