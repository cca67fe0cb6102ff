"""The host's secure processor, as its agent sees it: commands to its hypervisor's port, and what it shows to whoever knocks."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Final, TypeVar

from spvtpm.hypervisor.frames import ask
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import MessageError, NotRunning, error_from_code
from spvtpm.wire.framing import MAX_FRAME_BYTES
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES, Knock, Papers, encode_clear, parse_clear
from spvtpm.wire.messages import (
    Admitted,
    AdmitVm,
    ErrorReply,
    GetStatus,
    ListVms,
    Reply,
    Request,
    Status,
    VmInfo,
    VmList,
    encode_message,
    parse_reply,
)

NAME: Final = "secure processor"
_COMMAND_S: Final = 120.0
_KNOCK_S: Final = 20.0
_PAPERS_S: Final = 60.0
_CONNECTIONS: Final = 32
"""At a time; the secure processor takes 64."""

_Reply = TypeVar("_Reply", bound=Reply)


class SecureProcessor:
    """The secure processor of a state directory. Each command goes over a connection of its own, so many at a time.

    Args:
        state: its state directory.
    """

    def __init__(self, state: Path) -> None:
        self._run = state.absolute() / "run"
        self._turns = asyncio.Semaphore(_CONNECTIONS)
        self._knocking = asyncio.Lock()
        self._papers: tuple[float, tuple[int, int], Papers] | None = None

    @property
    def channel_socket(self) -> Path:
        """Where channels of owners go in."""
        return self._run / "channel.sock"

    @property
    def migration_socket(self) -> Path:
        """Where links to other secure processors, and memory of VMs that move, go in and out."""
        return self._run / "migration.sock"

    def instance(self) -> tuple[int, int] | None:
        """Which start of the secure processor this is; None: it does not run, or is not ready."""
        try:
            status = (self._run / "channel.sock").stat()
        except OSError:
            return None
        return status.st_ino, status.st_ctime_ns

    async def call(self, request: Request, kind: type[_Reply]) -> _Reply:
        """Has a command carried out.

        Args:
            request: the command.
            kind: of its answer.

        Raises:
            NotRunning: nobody is there, or not any more: it may have been carried out or not.
            MessageError: the answer makes no sense.
            SpvtpmError: the refusal, as the class its code names.
        """
        async with self._turns:
            path = self._run / "sp.sock"
            reply = parse_reply(await ask(path, NAME, encode_message(request), MAX_FRAME_BYTES, _COMMAND_S))
        if isinstance(reply, ErrorReply):
            raise error_from_code(reply.code, reply.message)
        if not isinstance(reply, kind):
            raise MessageError(f"the secure processor answered with {type(reply).__name__}, not with {kind.__name__}")
        return reply

    async def admit(self, vm_id: uuid.UUID) -> None:
        """Tells it that a VM of this id may be provisioned."""
        await self.call(AdmitVm(vm_id=vm_id), Admitted)

    async def vm(self, vm_id: uuid.UUID) -> VmInfo | None:
        """One VM, if it has a security block: the first of those behind the id before."""
        before = uuid.UUID(int=vm_id.int - 1) if vm_id.int else None
        page = await self.call(ListVms(after=before), VmList)
        return next((vm for vm in page.vms if vm.vm_id == vm_id), None)

    async def vms(self) -> dict[uuid.UUID, VmInfo]:
        """All VMs by their id."""
        found: dict[uuid.UUID, VmInfo] = {}
        last: uuid.UUID | None = None
        while True:
            page = await self.call(ListVms(after=last), VmList)
            for vm in page.vms:
                if last is not None and vm.vm_id <= last:
                    raise MessageError("the secure processor lists its VMs in no order")
                found[vm.vm_id] = vm
                last = vm.vm_id
            if not page.more or not page.vms:
                return found

    async def status(self) -> Status:
        """How it is."""
        return await self.call(GetStatus(), Status)

    async def papers(self) -> Papers:
        """What it shows to whoever knocks; asked again after a minute, and after its restart.

        Raises:
            NotRunning: nobody is there.
            MessageError: the answer makes no sense.
            SpvtpmError: the refusal.
        """
        async with self._knocking:
            instance = self.instance()
            if instance is None:
                raise NotRunning(f"no {NAME} answers at {self.channel_socket}")
            if self._papers is not None:
                since, shown_by, papers = self._papers
                if shown_by == instance and time.monotonic() - since < _PAPERS_S:
                    return papers
            papers = await self._knock()
            self._papers = (time.monotonic(), instance, papers)
            return papers

    async def _knock(self) -> Papers:
        knock = encode_clear(Knock())
        message = parse_clear(await ask(self.channel_socket, NAME, knock, MAX_CHANNEL_FRAME_BYTES, _KNOCK_S))
        if isinstance(message, ErrorReply):
            raise error_from_code(message.code, printable(message.message))
        if not isinstance(message, Papers):
            raise MessageError(f"{type(message).__name__} where the secure processor's papers were expected")
        return message
