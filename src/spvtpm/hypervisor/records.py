"""What the agent has been ordered, a small file for each VM: durable before the agent acts on it.

A VM that is `absent` keeps its record for a while, so that an older order that comes late is still refused.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from spvtpm.files import read_file, replace_file
from spvtpm.wire.agent_api import HandoffName, HandoffOutcome, Sentence, TokenText, WantedState
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import StorageError

log = logging.getLogger(__name__)

MAX_ABSENT: Final = 4096
"""Records of absent VMs that are kept; the oldest go first."""

_MAX_RECORD_BYTES: Final = 16_384


class Brought(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What came with the newest order, of a handoff; as of `agent_api.Order`."""

    handoff: HandoffName
    token: TokenText | None = None


class HandoffRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The last handoff of a VM here, and what became of it. Its truth is the secure processor's.

    Attributes:
        handoff: its id.
        side: on which this host is.
        outcome: as of `agent_api.HandoffReport`, as the next ones.
        token: as told there.
        failure: as told there.
    """

    handoff: HandoffName
    side: Literal["source", "destination"]
    outcome: HandoffOutcome = "open"
    token: TokenText | None = None
    failure: Sentence = ""

    @property
    def is_unsettled(self) -> bool:
        """Whether the VM is leaving this host: its machine may be halted, and nobody but this agent lets it go on then."""
        return (self.side, self.outcome) == ("source", "open")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The newest order for one VM, and what became of it.

    Attributes:
        vm_id: the VM.
        sequence: of the order; 0: none.
        want: how the VM shall be; None: nothing was ordered yet.
        resuming: the secure processor has resumed the VM, or is about to, and the VM's memory is still in its image alone.
        failure: why the agent has given up.
        brought: what came with the order, until it is used up.
        handoff: the last one in which the VM has, or had, part here.
    """

    format: Literal[1] = 1
    vm_id: uuid.UUID
    sequence: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)] = 0
    want: WantedState | None = None
    resuming: bool = False
    failure: Sentence = ""
    brought: Brought | None = None
    handoff: HandoffRecord | None = None


class Records:
    """All records. Life: construct → `load()` → `put()` …

    Args:
        directory: made if it is missing.

    Raises:
        StorageError: it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {directory}: {error.strerror}") from None

    def load(self) -> list[Record]:
        """What is there. A record that cannot be believed is as good as none: the next order makes it anew."""
        found: list[tuple[float, Record]] = []
        for path in self._directory.iterdir():
            if path.name.startswith("."):
                path.unlink(missing_ok=True)  # a write that was cut off
                continue
            try:
                record = msgspec.json.decode(read_file(path, _MAX_RECORD_BYTES), type=Record)
                if path.name != str(record.vm_id):
                    raise StorageError(f"{path} is the record of VM {record.vm_id}")
            except (StorageError, *UNDECODABLE) as error:
                log.error("the record of VM %s is of no use: %s", path.name, error)
                continue
            found.append((path.stat().st_mtime, record))
        found.sort(key=lambda item: item[0])
        absent = [record for _time, record in found if record.want == "absent"]
        forgotten = {record.vm_id for record in absent[:-MAX_ABSENT]}
        for vm_id in forgotten:
            (self._directory / str(vm_id)).unlink(missing_ok=True)
        return [record for _time, record in found if record.vm_id not in forgotten]

    def put(self, record: Record) -> None:
        """Makes a record durable.

        Raises:
            StorageError: it cannot be written.
        """
        replace_file(self._directory / str(record.vm_id), msgspec.json.encode(record))

    def forget(self, vm_id: uuid.UUID) -> None:
        """Removes a record."""
        (self._directory / str(vm_id)).unlink(missing_ok=True)
