"""The copy of a VM's memory for a handoff, in rounds while it runs: what has changed since the last one, sealed, in a file."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from spvtpm.guest.memory_image import pack
from spvtpm.wire.errors import StorageError, WrongState
from spvtpm.wire.memory_records import PageLedger, parse_record
from spvtpm.wire.memory_stream import PageSealer, cut_pages, seal_final


class Copied(NamedTuple):
    """What a round has written.

    Attributes:
        records: so many.
        bytes: of all of them.
    """

    records: int
    bytes: int


class MemoryCopy:
    """Copies of one VM's memory. One handoff at a time; another one begins anew.

    Args:
        vm_key: 32 bytes.
        memory: the directory that is its memory.
        file: where each round's records go.
    """

    def __init__(self, vm_key: bytes, memory: Path, file: Path) -> None:
        self._vm_key = vm_key
        self._memory = memory
        self._file = file
        self._handoff: _Handoff | None = None
        self._finished = set[bytes]()

    def round(self, handoff_id: bytes) -> Copied:
        """Copies what has changed.

        Args:
            handoff_id: 16 bytes.

        Raises:
            WrongState: the copy for this handoff is finished.
            StorageError: the memory is too much, or cannot be read; or the file not be written.
        """
        handoff = self._handoff_of(handoff_id)
        self._handoff = None  # until its records are there: what is lost of them would be missing in the end
        copied = self._write(handoff.changed(pack(self._memory)))
        self._handoff = handoff
        return copied

    def finish(self, handoff_id: bytes, stop_nonce: bytes) -> Copied:
        """Copies what has changed, for the last time, and vouches for all of it. Nothing may change meanwhile.

        Args:
            handoff_id: 16 bytes.
            stop_nonce: 32 bytes.

        Raises:
            WrongState, StorageError: as of `round`.
        """
        handoff = self._handoff_of(handoff_id)
        memory = pack(self._memory)
        records = [*handoff.changed(memory), handoff.final(stop_nonce, len(memory))]
        self._finished.add(handoff_id)  # before anybody has it: the VM may go on, and change
        self._handoff = None
        return self._write(records)

    def discard(self) -> None:
        """Removes the file."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _handoff_of(self, handoff_id: bytes) -> _Handoff:
        if handoff_id in self._finished:
            raise WrongState("the copy of the VM's memory for this handoff is finished")
        if self._handoff is None or self._handoff.handoff_id != handoff_id:
            self._handoff = _Handoff(self._vm_key, handoff_id)
        return self._handoff

    def _write(self, records: list[bytes]) -> Copied:
        """Not durable: a machine that ends takes its handoff with it."""
        new = self._file.with_name(f"{self._file.name}.new")
        content = b"".join(records)
        try:
            new.unlink(missing_ok=True)
            with new.open("xb") as file:
                file.write(content)
            new.replace(self._file)
        except OSError as error:
            raise StorageError(f"cannot write {self._file}: {error.strerror}") from None
        return Copied(len(records), len(content))


class _Handoff:
    """What has been copied for one handoff."""

    def __init__(self, vm_key: bytes, handoff_id: bytes) -> None:
        self.handoff_id = handoff_id
        self._vm_key = vm_key
        self._sealer = PageSealer(vm_key, handoff_id)
        self._digests = dict[int, bytes]()
        self._ledger = PageLedger()

    def changed(self, memory: bytes) -> list[bytes]:
        """Records of the pages that are not as they were."""
        records = []
        for index, page in enumerate(cut_pages(memory)):
            digest = hashlib.sha256(page).digest()
            if self._digests.get(index) != digest:
                self._digests[index] = digest
                record = self._sealer.seal(index, page)
                self._ledger.take(parse_record(record))
                records.append(record)
        return records

    def final(self, stop_nonce: bytes, memory_bytes: int) -> bytes:
        return seal_final(self._vm_key, self.handoff_id, stop_nonce, self._ledger, memory_bytes)
