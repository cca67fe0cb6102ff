"""Which VMs an owner may provision here: so many in all, so many of one owner, and, if that is wanted, those that were announced.

Keys of owners are free, so a bound on each owner keeps no stranger from filling the table. Where the channel is open to
strangers, the hypervisor announces each VM first, once its platform knows whose it is to be.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import dataclass, field

from spvtpm.wire.errors import NotAdmitted

MAX_ADMITTED = 4096
"""VMs that are announced and not provisioned yet; the one that has waited longest gives way to a new one."""


@dataclass(slots=True)
class Admission:
    """Bounds of the table of VMs.

    Attributes:
        max_vms: VMs at a time.
        max_vms_of_one_owner: of them, an owner's.
        is_required: whether a VM has to be announced.
    """

    max_vms: int
    max_vms_of_one_owner: int
    is_required: bool
    _announced: OrderedDict[uuid.UUID, None] = field(default_factory=OrderedDict)

    def admit(self, vm_id: uuid.UUID) -> None:
        """The hypervisor announces a VM. Forgotten when the SP restarts."""
        self._announced[vm_id] = None
        self._announced.move_to_end(vm_id)
        while len(self._announced) > MAX_ADMITTED:
            self._announced.popitem(last=False)

    def check(self, vm_id: uuid.UUID) -> None:
        """Whether the VM may come.

        Raises:
            NotAdmitted: it was not announced, and has to be.
        """
        if self.is_required and vm_id not in self._announced:
            raise NotAdmitted(f"VM {vm_id} was not announced by this host")

    def has_come(self, vm_id: uuid.UUID) -> None:
        """The announcement is used up."""
        self._announced.pop(vm_id, None)
