"""Who plays in the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spvtpm.demo.attacker import HostView, PlainVtpm
from spvtpm.demo.cloud_vm import CloudVm
from spvtpm.demo.owner import OwnerTerminal
from spvtpm.demo.platform import CloudPlatform
from spvtpm.demo.stage import ChipVendor, SecureProcessorHost
from spvtpm.demo.story import Story


@dataclass(slots=True)
class Cast:
    """Who plays.

    Attributes:
        story: prints and checks.
        directory: temporary, for all of it.
        vendor: makes the chips that the owners trust.
        forger: makes chips under the same name.
        cloud: the platform.
        host: where the VMs begin.
        next_host: another one, with a chip of the same fleet.
        impostor: a host with the forger's chip.
        outdated: a host with a chip of the fleet, and older firmware.
        alice: owner of VM A.
        bob: owner of VM B.
        vms: VM A and VM B.
        view: what the hypervisor sees of VM A's interface.
        plain: a vTPM without our protection, for contrast.
        keys: each VM's endorsement key, once it was read.
    """

    story: Story
    directory: Path
    vendor: ChipVendor
    forger: ChipVendor
    cloud: CloudPlatform
    host: SecureProcessorHost
    next_host: SecureProcessorHost
    impostor: SecureProcessorHost
    outdated: SecureProcessorHost
    alice: OwnerTerminal
    bob: OwnerTerminal
    vms: tuple[CloudVm, CloudVm]
    view: HostView | None = None
    plain: PlainVtpm | None = None
    keys: dict[str, bytes] | None = None

    def close(self) -> None:
        """Ends what was opened on the way."""
        for part in (self.view, self.plain, self.alice, self.bob):
            if part is not None:
                part.close()
