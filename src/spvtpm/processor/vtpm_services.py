"""What all vTPMs of one secure processor share."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.processor.parking import ParkingLot
from spvtpm.processor.worker_pool import WorkerPool

Commit = Callable[[Sequence[Change]], Coroutine[None, None, None]]
"""Returns once the changes are durable, or raises `StorageError`."""


@dataclass(frozen=True, slots=True)
class Boot:
    """A boot that has begun, for its vTPM.

    Attributes:
        boot_id: 16 bytes.
        key: 32 bytes.
        uids: whose processes may take the interface.
        emulated: whether that is the TPM emulator interface; otherwise it is the direct path.
    """

    boot_id: bytes
    key: bytes = field(repr=False)
    uids: frozenset[int]
    emulated: bool = False


@dataclass(frozen=True, slots=True)
class VtpmServices:
    """What every vTPM of an SP shares.

    Attributes:
        store: non-volatile storage, for reading.
        commit: makes changes to it durable.
        pool: worker processes.
        parking: parked states.
        runtime: directory of interface sockets.
        on_failure: told of each VM whose vTPM died by itself, and why.
    """

    store: NvStore
    commit: Commit
    pool: WorkerPool
    parking: ParkingLot
    runtime: Path
    on_failure: Callable[[uuid.UUID, str], None]
