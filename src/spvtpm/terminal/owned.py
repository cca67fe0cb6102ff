"""What the keyring keeps for use with a cloud platform: the way to it, and the owner's VMs by name. Pure.

Which id and which key belong to a name is what this says, and never what a platform says.
"""

from __future__ import annotations

import uuid
from typing import Annotated

import msgspec
from msgspec import Meta

from spvtpm.wire.instance_content import Label, Policy
from spvtpm.wire.mailbox import KEY_BYTES
from spvtpm.wire.platform_api import Name, Wants

MAX_URL_CHARACTERS = 300

_Id = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The way to a cloud platform. Its `repr` shows no secret.

    Attributes:
        url: `https://host[:port]`, `http://host[:port]` or `unix:/path`.
        token: that the platform's administrator gave. Secret.
        ca_file: certificates of the authorities that may vouch for the platform, PEM; empty: those of this machine.
        plain_http: whether http is spoken with another machine than this one, as its owner has said.
    """

    url: Annotated[str, Meta(max_length=MAX_URL_CHARACTERS)]
    token: Annotated[str, Meta(pattern=r"\A[!-~]{1,256}\Z")]
    ca_file: Annotated[str, Meta(max_length=4096)] = ""
    plain_http: bool = False

    def __repr__(self) -> str:
        return f"Account({self.url})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("url", self.url)]


class OwnedVm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A VM of the owner at a platform. Its `repr` shows no secret.

    Attributes:
        name: the owner's word for it.
        vm_id: its id, random.
        vm_key: 32 bytes, which the VM's secure processor gets, and from it the VM. Secret.
        policy: what is allowed to be done with its vTPM.
        label: the owner's words for its vTPM.
        fleet_id: of the chips that will do, 16 bytes; None: any fleet.
        host: the one host that will do; None: any.
        chip_id: of the chip where it was made, or was about to be, 16 bytes; None: it was not begun at any.
        is_made: whether its vTPM is known to have been made; from then on, what the keyring says of the vTPM counts.
    """

    name: Name
    vm_id: uuid.UUID
    vm_key: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    policy: Policy
    label: Label = ""
    fleet_id: _Id | None = None
    host: Name | None = None
    chip_id: _Id | None = None
    is_made: bool = False

    def __repr__(self) -> str:
        return f"OwnedVm({self.name}, {self.vm_id})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("name", self.name), ("vm_id", self.vm_id)]

    def wants(self) -> Wants:
        """What the platform is asked for."""
        chips = self.policy.chips
        return Wants(
            chips=None if chips is None else sorted(chip.hex() for chip in chips),
            minimum_firmware=self.policy.minimum_firmware,
            host=self.host,
        )
