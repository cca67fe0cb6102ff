"""vTPMs that were given to another chip, until that one has told that it has them: their tokens can be asked for again.

Of a handoff that is over so, its id is left, in 256 buckets: its abort token is not told. A bucket that is full forgets the
oldest; then it would be told, and nobody act on it: who has told that a vTPM runs there throws it away no more.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from spvtpm.processor.nv_store import Change, NvStore
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import IntegrityError, TooMany
from spvtpm.wire.messages import Token

MAX_DEPARTURES: Final = 4096
MAX_BUCKET_IDS: Final = 1024
_PREFIX: Final = "departed/"
_FORGOTTEN_PREFIX: Final = "forgotten/"
_Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Departure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of them. Its `repr` shows no token.

    Attributes:
        vm_id: the VM.
        chip: that has it now, 16 bytes.
        commit: the token on which that one may run it.
        receipt_sha256: of the token with which it tells that it does.
    """

    vm_id: uuid.UUID
    chip: Annotated[bytes, Meta(min_length=16, max_length=16)]
    commit: Token
    receipt_sha256: _Sha256

    def __repr__(self) -> str:
        return f"Departure(vm_id={self.vm_id})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("vm_id", self.vm_id)]


class Departures:
    """All of them. Reads NV when it is asked.

    Args:
        store: where they are kept, for reading.
    """

    def __init__(self, store: NvStore) -> None:
        self._store = store

    def find(self, vm_id: uuid.UUID, handoff: bytes) -> Departure | None:
        """A VM's departure in a handoff, 16 bytes; None: it has not left in that, or it is forgotten.

        Raises:
            IntegrityError: the record is damaged.
        """
        name = _name(handoff)
        if name not in self._store:
            return None
        try:
            found = msgspec.msgpack.decode(self._store.read(name), type=Departure)
        except UNDECODABLE:
            raise IntegrityError(f"NV record {name} is damaged") from None
        return found if found.vm_id == vm_id else None

    def is_forgotten(self, handoff: bytes) -> bool:
        """Whether a handoff, 16 bytes, was one by which a vTPM has left, and its receipt has come.

        Raises:
            IntegrityError: the record is damaged.
        """
        return handoff in self._forgotten(handoff)

    def forgetting(self, handoff: bytes) -> list[Change]:
        """The NV changes that forget a departure. The caller holds the ledger's lock until they are durable.

        Raises:
            IntegrityError: the record is damaged.
        """
        kept = [*self._forgotten(handoff), handoff][-MAX_BUCKET_IDS:]
        return [(_name(handoff), None), (_forgotten_name(handoff), msgspec.msgpack.encode(kept))]

    def _forgotten(self, handoff: bytes) -> list[bytes]:
        name = _forgotten_name(handoff)
        if name not in self._store:
            return []
        try:
            return msgspec.msgpack.decode(self._store.read(name), type=list[bytes])
        except UNDECODABLE:
            raise IntegrityError(f"NV record {name} is damaged") from None

    def check_room(self) -> None:
        """Whether another one can be kept.

        Raises:
            TooMany: there are as many as can be.
        """
        if len(self._store.names(_PREFIX)) >= MAX_DEPARTURES:
            raise TooMany(
                f"{MAX_DEPARTURES} vTPMs have left, and the chips that they went to have not told that they have them"
            )


def departure_change(handoff: bytes, departure: Departure) -> Change:
    """The NV change that keeps a departure."""
    return _name(handoff), msgspec.msgpack.encode(departure)


def _name(handoff: bytes) -> str:
    return f"{_PREFIX}{handoff.hex()}"


def _forgotten_name(handoff: bytes) -> str:
    return f"{_FORGOTTEN_PREFIX}{handoff[0]:02x}"
