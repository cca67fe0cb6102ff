"""A VM that leaves this host while it runs: its memory goes out in rounds, then it is halted, and its vTPM follows.

The memory goes to the secure processor, which passes it on over the link that somebody carries (`relay.py`). Whatever goes
wrong, the handoff is taken back, and the VM runs on: that is somebody else's step, and this one's work is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Final, Literal, TypeVar

from spvtpm.hypervisor.frames import FrameStream, connected
from spvtpm.hypervisor.secure_processor import NAME, SecureProcessor
from spvtpm.hypervisor.virtual_machine import VirtualMachine
from spvtpm.wire.errors import ResourceError, SpvtpmError, WrongState, error_from_code
from spvtpm.wire.framing import MAX_FRAME_BYTES
from spvtpm.wire.memory_records import MAX_RECORD_BYTES
from spvtpm.wire.messages import ErrorReply, HandoffToken, SendFinish, SendStop, SendStopped
from spvtpm.wire.migration import MemoryIn, encode_migration, parse_meeting
from spvtpm.wire.platform_errors import Unavailable

log = logging.getLogger(__name__)

LINK_WITHIN_S: Final = 60.0
"""A handoff to which nobody brings a link for so long is taken back."""

MAX_ROUNDS: Final = 8
_LITTLE_BYTES: Final = 4 * MAX_RECORD_BYTES
"""Of a round: the rest may as well go while the VM stands still."""

_LAST_WORDS_S: Final = 5.0
_Result = TypeVar("_Result")


class Departure:
    """One handoff at its source. Life: construct → `linked()` → `move` → `close()`; or `interrupt`.

    Args:
        sp: the host's secure processor.
        machine: of the VM.
        vm_id: the VM.
        handoff: its id, 16 bytes.
    """

    def __init__(self, sp: SecureProcessor, machine: VirtualMachine, vm_id: uuid.UUID, handoff: bytes) -> None:
        self._sp = sp
        self._machine = machine
        self._vm_id = vm_id
        self.handoff = handoff
        self._link_by_s = time.monotonic() + LINK_WITHIN_S
        self._is_linked = False
        self._unwanted = asyncio.Event()
        self._cleanup = AsyncExitStack()
        self.copied_bytes = 0

    @property
    def way(self) -> Literal["none", "waiting", "linked"]:
        """To the other end, as of `steps.Way`."""
        if self._is_linked:
            return "linked"
        return "waiting" if time.monotonic() < self._link_by_s else "none"

    @contextmanager
    def linked(self) -> Iterator[None]:
        """The link is being carried.

        Raises:
            WrongState: it is already, or was.
        """
        if self.way != "waiting":
            raise WrongState(f"the handoff of VM {self._vm_id} has, or had, its link")
        self._is_linked = True
        yield  # the secure processor knows when it has ended

    def interrupt(self) -> None:
        """It is not wanted any more: whoever waits in it learns that."""
        self._unwanted.set()

    async def move(self) -> bytes:
        """Moves it; gives the commit token, 32 bytes.

        Sends memory until little is left, halts the machine, has the vTPM stopped, sends the rest, and has the vTPM given up.

        Raises:
            SpvtpmError: it was not given up, or that is not known. The machine may be halted.
        """
        stream = await self._open_memory()
        await self._send_rounds(stream)
        await self._machine.halt()
        stop = SendStop(vm_id=self._vm_id, handoff=self.handoff)
        stopped = await self._unless_unwanted(self._sp.call(stop, SendStopped))
        await self._send(stream, self._machine.finish_copy(self.handoff, stopped.stop_nonce))
        finish = SendFinish(vm_id=self._vm_id, handoff=self.handoff)
        return (await self._unless_unwanted(self._sp.call(finish, HandoffToken))).token

    async def _send_rounds(self, stream: FrameStream) -> None:
        before = 0
        for _round in range(MAX_ROUNDS):
            sent = await self._send(stream, self._machine.copy_memory(self.handoff))
            if sent <= _LITTLE_BYTES or (before and sent > before * 3 // 4):  # it changes as fast as it goes
                return
            before = sent

    async def close(self) -> None:
        """Ends; the link is the secure processor's."""
        await self._cleanup.aclose()

    async def _open_memory(self) -> FrameStream:
        stream = await self._cleanup.enter_async_context(connected(self._sp.migration_socket, NAME, MAX_FRAME_BYTES))
        await stream.send(encode_migration(MemoryIn(self.handoff)))
        return stream

    async def _send(self, stream: FrameStream, records: AsyncIterator[bytes]) -> int:
        sent = 0
        async for record in records:
            try:
                await self._unless_unwanted(stream.send(record))
            except OSError:
                raise await self._why(stream) from None
            sent += len(record)
            self.copied_bytes += len(record)
        return sent

    async def _why(self, stream: FrameStream) -> SpvtpmError:
        """What the secure processor said before it took no more."""
        with suppress(SpvtpmError, OSError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                said = await stream.receive()
            if said is not None and isinstance(reply := parse_meeting(said), ErrorReply):
                return error_from_code(reply.code, reply.message)
        return ResourceError(f"the secure processor takes no more of VM {self._vm_id}: its link may have ended")

    async def _unless_unwanted(self, doing: Awaitable[_Result]) -> _Result:
        """Its result. What the secure processor was asked for it may carry out all the same.

        Raises:
            Unavailable: it was interrupted.
        """
        task = asyncio.ensure_future(doing)
        unwanted = asyncio.ensure_future(self._unwanted.wait())
        try:
            await asyncio.wait([task, unwanted], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Unavailable(f"VM {self._vm_id} is not to leave any more")
            return task.result()
        finally:
            task.cancel()
            unwanted.cancel()
            await asyncio.gather(task, unwanted, return_exceptions=True)
