"""A VM that comes to this host: the records of its memory are gathered as its secure processor hands them out."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Literal

from spvtpm.hypervisor.frames import connected
from spvtpm.hypervisor.secure_processor import NAME, SecureProcessor
from spvtpm.wire.errors import SpvtpmError, WrongState
from spvtpm.wire.memory_records import MAX_RECORD_BYTES, NewestRecords
from spvtpm.wire.migration import MemoryOut, encode_migration

log = logging.getLogger(__name__)

LINK_WITHIN_S: Final = 60.0
"""One to which nobody brings a link for so long, or whose vTPM does not follow its memory, is not expected any more."""

_REST_WITHIN_S: Final = 20.0
"""The source has seen the end of the memory go out before it gave the vTPM up."""


class Arrival:
    """One handoff at its destination. Life: construct → `linked()` → `memory` → `close()`.

    Args:
        sp: the host's secure processor, which expects the VM.
        vm_id: the VM.
        handoff: its id, 16 bytes.
    """

    def __init__(self, sp: SecureProcessor, vm_id: uuid.UUID, handoff: bytes) -> None:
        self._sp = sp
        self._vm_id = vm_id
        self.handoff = handoff
        self.instance = sp.instance()
        self._due_s = time.monotonic() + LINK_WITHIN_S
        self._is_linked = False
        self._gathered = NewestRecords()
        self.copied_bytes = 0
        self._gathering = asyncio.get_running_loop().create_task(self._gather())

    @property
    def way(self) -> Literal["none", "waiting", "linked", "ended"]:
        """To the other end, as of `steps.Way`."""
        if self.instance != self._sp.instance() and not self._gathered.is_whole:
            return "none"  # the secure processor does not expect it any more
        if self._gathering.done() and not self._gathered.is_whole:
            return "ended"
        if time.monotonic() >= self._due_s and (self._gathering.done() or not self._is_linked):
            return "ended"
        return "linked" if self._is_linked else "waiting"

    @contextmanager
    def linked(self) -> Iterator[None]:
        """The link is being carried.

        Raises:
            WrongState: it is already, or was.
        """
        if self.way != "waiting":
            raise WrongState(f"the handoff of VM {self._vm_id} has, or had, its link")
        self._is_linked = True
        try:
            yield
        finally:
            self._due_s = time.monotonic() + LINK_WITHIN_S

    async def memory(self) -> NewestRecords | None:
        """All of it; None: some is missing, and will not come."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_REST_WITHIN_S):
                await asyncio.shield(self._gathering)
        return self._gathered if self._gathered.is_whole else None

    async def close(self) -> None:
        """Takes nothing more."""
        self._gathering.cancel()
        await asyncio.gather(self._gathering, return_exceptions=True)

    async def _gather(self) -> None:
        """Until its end, or until nothing more comes."""
        try:
            async with connected(self._sp.migration_socket, NAME, MAX_RECORD_BYTES) as stream:
                await stream.send(encode_migration(MemoryOut(self.handoff)))
                while not self._gathered.is_whole and (record := await stream.receive()) is not None:
                    self._gathered.take(record)
                    self.copied_bytes += len(record)
        except (SpvtpmError, OSError) as error:
            log.warning("VM %s: its memory does not come: %s", self._vm_id, error)
