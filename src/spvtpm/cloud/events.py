"""Events of VMs: what happened, for their users to read. Whoever changes something comes in."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, insert

from spvtpm.cloud import tables

if TYPE_CHECKING:
    import uuid

_MAX_DETAIL: Final = 2048  # agent_api.Sentence


def record_event(connection: Connection, vm_id: uuid.UUID, what: str, detail: str = "") -> None:
    """Something happened to a VM.

    Args:
        connection: in a transaction.
        vm_id: the VM.
        what: a word.
        detail: a sentence; cut at 2048 characters.
    """
    connection.execute(
        insert(tables.events).values(vm_id=vm_id, time_s=time.time(), what=what, detail=detail[:_MAX_DETAIL])
    )
