"""What a secure processor keeps of a VM's coming from another one, as long as it has the VM."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from spvtpm.wire.messages import HandoffId, Token

_Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a VM has come from another secure processor. Its `repr` shows no token.

    Attributes:
        handoff: its id.
        source: chip that it came from, 16 bytes.
        commit_sha256: of the token on which it may run here.
        abort_sha256: of the token on which it is to be thrown away.
        receipt: tells its source that it runs here.
        stop_nonce: of the memory with which it goes on, 32 bytes.
        boots: of the VM when it came, or was hibernated before it had its memory; filled in by `VmSecurityBlock.arrive`.
    """

    handoff: HandoffId
    source: Annotated[bytes, Meta(min_length=16, max_length=16)]
    commit_sha256: _Sha256
    abort_sha256: _Sha256
    receipt: Token
    stop_nonce: Token
    boots: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0

    def __repr__(self) -> str:
        return f"Arrival(handoff={self.handoff.hex()})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("handoff", self.handoff.hex())]
