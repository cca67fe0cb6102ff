"""What a VM's security block has from the VM's owner."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from spvtpm.wire.instance_content import Label, Policy
from spvtpm.wire.instance_file import SECRET_BYTES
from spvtpm.wire.mailbox import KEY_BYTES
from spvtpm.wire.owner_certificates import FINGERPRINT_BYTES


class Ownership(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the owner brought through the confidential channel. Its `repr` shows no secret.

    Attributes:
        owner: fingerprint of the owner's key, 32 bytes, public.
        user_secret: 32 bytes.
        vm_key: 32 bytes, shared with the VM.
        policy: what the owner allows.
        label: the owner's words for the vTPM.
        inject_key: whether the VM is handed its key at each boot.
    """

    owner: Annotated[bytes, Meta(min_length=FINGERPRINT_BYTES, max_length=FINGERPRINT_BYTES)]
    user_secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    vm_key: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    policy: Policy
    label: Label
    inject_key: bool

    def __repr__(self) -> str:
        return f"Ownership(owner={self.owner.hex()})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("owner", self.owner.hex())]
