"""What became of the vTPMs that are not here any more, so that no older copy of one is ever taken back (B3).

An entry for each vTPM that left or was destroyed: who owned it, in which version it left, and the least version that may come
back. Kept in 256 buckets, each one NV record, so that the NV store's index stays small however many vTPMs come and go. A bucket
that is full forgets what left first; the owner's terminal remembers for ever.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import IntegrityError
from spvtpm.wire.owner_certificates import FINGERPRINT_BYTES

MAX_BUCKET_ENTRIES = 512
_PREFIX = "ledger/"
_Version = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One vTPM that is gone.

    Attributes:
        owner: fingerprint of its owner's key, 32 bytes.
        how: it left.
        version: of its last export or import here; 0 if there was none.
        least: the oldest version that may come back.
        sha256: of the file that its owner acknowledged, 32 bytes, if it was exported.
        chip: that it was given to, 16 bytes, if it has migrated.
    """

    owner: Annotated[bytes, Meta(min_length=FINGERPRINT_BYTES, max_length=FINGERPRINT_BYTES)]
    how: Literal["exported", "migrated", "destroyed"]
    version: _Version
    least: _Version
    sha256: Annotated[bytes, Meta(min_length=32, max_length=32)] | None
    chip: Annotated[bytes, Meta(min_length=16, max_length=16)] | None = None


_Bucket = dict[uuid.UUID, Entry]


class Ledger:
    """The entries. Reads NV when it is asked; whoever writes holds `lock` from the change until it is durable.

    Args:
        store: where the buckets are kept, for reading.

    Attributes:
        lock: one change at a time.
    """

    def __init__(self, store: NvStore) -> None:
        self._store = store
        self.lock = asyncio.Lock()

    def find(self, vtpm_id: uuid.UUID) -> Entry | None:
        """What became of the vTPM, if it was here and is gone.

        Raises:
            IntegrityError: the bucket is damaged.
        """
        return self._bucket(vtpm_id).get(vtpm_id)

    def change(self, vtpm_id: uuid.UUID, entry: Entry | None) -> Change:
        """The NV change that makes the entry; None: the vTPM is here again.

        Raises:
            IntegrityError: the bucket is damaged.
        """
        bucket = self._bucket(vtpm_id)
        bucket.pop(vtpm_id, None)
        if entry is not None:
            while len(bucket) >= MAX_BUCKET_ENTRIES:
                del bucket[next(iter(bucket))]
            bucket[vtpm_id] = entry
        return _name(vtpm_id), msgspec.msgpack.encode(bucket) if bucket else None

    def _bucket(self, vtpm_id: uuid.UUID) -> _Bucket:
        name = _name(vtpm_id)
        if name not in self._store:
            return {}
        try:
            return msgspec.msgpack.decode(self._store.read(name), type=_Bucket)
        except UNDECODABLE:
            raise IntegrityError(f"NV record {name} is damaged") from None


def _name(vtpm_id: uuid.UUID) -> str:
    return f"{_PREFIX}{vtpm_id.bytes[0]:02x}"
