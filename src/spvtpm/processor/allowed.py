"""Whether an owner's policy allows the chip and the firmware that are here."""

from __future__ import annotations

from dataclasses import dataclass

from spvtpm.wire.errors import ChipNotAllowed, FirmwareTooOld
from spvtpm.wire.instance_content import Policy


@dataclass(frozen=True, slots=True)
class Here:
    """What runs here.

    Attributes:
        chip_id: 16 bytes.
        firmware: its version.
    """

    chip_id: bytes
    firmware: int

    def check(self, policy: Policy) -> None:
        """When a vTPM comes, and at each of its boots: firmware can be put back to an older one.

        Raises:
            ChipNotAllowed, FirmwareTooOld: the owner does not allow it.
        """
        if policy.chips is not None and self.chip_id not in policy.chips:
            raise ChipNotAllowed(f"the owner's policy does not allow the chip {self.chip_id.hex()}")
        if policy.minimum_firmware > self.firmware:
            raise FirmwareTooOld(
                f"the owner's policy asks for firmware {policy.minimum_firmware}; this is {self.firmware}"
            )
