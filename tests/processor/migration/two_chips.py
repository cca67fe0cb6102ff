"""Two real secure processors, and whoever carries between them: frames of the link, memory, commands, tokens."""

from __future__ import annotations

import socket
import tempfile
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from spvtpm.wire import messages
from spvtpm.wire.errors import error_from_code
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.memory_records import PageLedger, parse_record
from spvtpm.wire.memory_stream import PageSealer, cut_pages, seal_final
from spvtpm.wire.migration import Link, MemoryIn, MemoryOut, encode_migration
from spvtpm.wire.revocation import RevocationList
from tests.harness import RunningSp
from tests.papers import Papers, todays_papers

Side = Literal["source", "destination"]
"""Who has sent a frame."""

Hook = Callable[[Side, int, bytes], list[bytes]]
"""What becomes of a side's n-th frame: what is handed on in its place. `Cut` ends the link."""

PATIENCE_S = 30.0
_Reply = TypeVar("_Reply", bound=messages.Reply)


class Cut(Exception):
    """The carrier ends the link."""


def honest(_side: Side, _number: int, frame: bytes) -> list[bytes]:
    """Hands everything on."""
    return [frame]


def ask(sp: RunningSp, request: messages.Request, kind: type[_Reply]) -> _Reply:
    """A command of the hypervisor.

    Raises:
        SpvtpmError: its refusal.
    """
    reply = sp.call(request)
    if isinstance(reply, messages.ErrorReply):
        raise error_from_code(reply.code, reply.message)
    assert isinstance(reply, kind), reply
    return reply


def connect(sp: RunningSp, opening: Any) -> socket.socket:
    """A connection to its migration socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_S)
    connection.connect(str(sp.state / "run" / "migration.sock"))
    connection.sendall(encode_frame(encode_migration(opening)))
    return connection


class Frames:
    """Frames that come from a connection, one by one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._decoder = connection, FrameDecoder()
        self._waiting: list[bytes] = []

    def receive(self) -> bytes | None:
        """The next one; None: there is none any more."""
        while not self._waiting:
            data = self._connection.recv(1 << 18)
            if not data:
                return None
            self._waiting += self._decoder.feed(data)
        return self._waiting.pop(0)


class Carrier:
    """Carries the frames of one link, and keeps what it has seen.

    Args:
        source: where the vTPM is.
        destination: where it shall go.
        handoff: its id.
        hook: what becomes of each frame.
        revoked: a list that it brings along.
    """

    def __init__(
        self, source: RunningSp, destination: RunningSp, handoff: bytes, hook: Hook = honest, revoked: bytes = b""
    ) -> None:
        self.seen: list[tuple[Side, bytes]] = []
        self._hook = hook
        self._over = threading.Event()
        self._ends = {
            "source": connect(source, Link(handoff, revoked)),
            "destination": connect(destination, Link(handoff, revoked)),
        }
        self._threads = [
            threading.Thread(target=self._carry, args=("source", "destination"), daemon=True),
            threading.Thread(target=self._carry, args=("destination", "source"), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, side: Side, other: Side) -> None:
        frames, number = Frames(self._ends[side]), 0
        with suppress(OSError, Cut):
            while (frame := frames.receive()) is not None:
                self.seen.append((side, frame))
                for instead in self._hook(side, number, frame):
                    self._ends[other].sendall(encode_frame(instead))
                number += 1
        self.cut()

    def cut_when_quiet(self) -> None:
        """Ends the link once nothing has gone through for a moment: what is lost keeps both sides waiting."""

        def watch() -> None:
            before = -1
            while before != len(self.seen):
                before = len(self.seen)
                self._over.wait(1.0)
            self.cut()

        self._threads.append(threading.Thread(target=watch, daemon=True))
        self._threads[-1].start()

    def cut(self) -> None:
        """Ends the link."""
        self._over.set()
        for end in self._ends.values():
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def half_close(self, side: Side) -> None:
        """A side hears that nothing more comes; what it says is still taken, or not."""
        self._ends[side].shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the link, and waits until it has ended."""
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for end in self._ends.values():
            end.close()


class Memory:
    """The memory of a VM that moves.

    Args:
        vm_key: of the VM.
        handoff: in which it moves.
    """

    def __init__(self, vm_key: bytes, handoff: bytes) -> None:
        self._vm_key, self._handoff = vm_key, handoff
        self._sealer, self._ledger = PageSealer(vm_key, handoff), PageLedger()

    def pages(self, memory: bytes) -> list[bytes]:
        """Its records."""
        records = [self._sealer.seal(index, page) for index, page in enumerate(cut_pages(memory))]
        for record in records:
            self._ledger.take(parse_record(record))
        return records

    def final(self, stop_nonce: bytes, memory_bytes: int) -> bytes:
        """The final one."""
        return seal_final(self._vm_key, self._handoff, stop_nonce, self._ledger, memory_bytes)


class TwoChips:
    """Two chips of one fleet, and an owner's VM on the first.

    Args:
        vendor: of both.
        other_vendor: of the second, if it is another one.
        config: of both.
    """

    def __init__(
        self, vendor: Papers | None = None, other_vendor: Papers | None = None, config: str | None = None
    ) -> None:
        self._cleanup = ExitStack()
        directory = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="spvtpm-")))
        self.vendor = vendor or todays_papers()
        self.a = self._cleanup.enter_context(RunningSp(directory / "a", config, self.vendor))
        self.b = self._cleanup.enter_context(RunningSp(directory / "b", config, other_vendor or self.vendor))
        self.revoked = list_of(self.vendor).encode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def begin(
        self, vm_id: uuid.UUID, hook: Hook = honest, *, source: RunningSp | None = None, revoked: bytes | None = None
    ) -> Handoff:
        """A handoff whose link is being made."""
        source = source or self.a
        destination = self.b if source is self.a else self.a
        handoff = Handoff(source, destination, vm_id, hook, self.revoked if revoked is None else revoked)
        self._cleanup.callback(handoff.close)
        return handoff


def list_of(vendor: Papers, revoked: tuple[int, ...] = (), number: int = 1) -> RevocationList:
    """The vendor's list of revoked chips, current."""
    return vendor.revocation_list(revoked, number, vendor.root.certificate.not_valid_before_utc)


class Handoff:
    """One handoff, and whoever carries for it.

    Args:
        source: where the vTPM is.
        destination: where it shall go.
        vm_id: the VM.
        hook: what becomes of each frame of the link.
        revoked: a list of revoked chips that the carrier brings along.
    """

    def __init__(self, source: RunningSp, destination: RunningSp, vm_id: uuid.UUID, hook: Hook, revoked: bytes) -> None:
        self.source, self.destination, self.vm_id = source, destination, vm_id
        self.id = ask(source, messages.SendStart(vm_id=vm_id), messages.Handoff).handoff
        ask(destination, messages.ReceiveStart(vm_id=vm_id, handoff=self.id), messages.Handoff)
        self.carrier = Carrier(source, destination, self.id, hook, revoked)
        self.memory = Memory(source.key(vm_id), self.id)
        self.came: list[bytes] = []
        self._in = connect(source, MemoryIn(self.id))
        self._out = connect(destination, MemoryOut(self.id))
        self._taker = threading.Thread(target=self._take, daemon=True)
        self._taker.start()
        self._bytes = 0
        self.nonce = b""
        destination._keys[vm_id] = source.key(vm_id)

    def _take(self) -> None:
        frames = Frames(self._out)
        with suppress(OSError):
            while (frame := frames.receive()) is not None:
                self.came.append(frame)

    def send_memory(self, memory: bytes) -> None:
        """A round of the VM's memory."""
        self._bytes = len(memory)
        for record in self.memory.pages(memory):
            self._in.sendall(encode_frame(record))

    def stop(self) -> bytes:
        """Stops the vTPM; waits for the link."""
        return ask(self.source, messages.SendStop(vm_id=self.vm_id, handoff=self.id), messages.SendStopped).stop_nonce

    def send_final(self, stop_nonce: bytes) -> None:
        """The end of the memory."""
        self._in.sendall(encode_frame(self.memory.final(stop_nonce, self._bytes)))

    def finish(self) -> bytes:
        """Gives the vTPM up; the commit token."""
        request = messages.SendFinish(vm_id=self.vm_id, handoff=self.id)
        return ask(self.source, request, messages.HandoffToken).token

    def cancel(self) -> bytes:
        """Keeps the vTPM; the abort token."""
        request = messages.SendCancel(vm_id=self.vm_id, handoff=self.id)
        return ask(self.source, request, messages.HandoffToken).token

    def receive(self, token: bytes) -> bytes:
        """Brings the commit token; the receipt."""
        request = messages.ReceiveFinish(vm_id=self.vm_id, handoff=self.id, token=token)
        return ask(self.destination, request, messages.HandoffToken).token

    def discard(self, token: bytes | None = None) -> None:
        """Brings the abort token, or none."""
        request = messages.ReceiveCancel(vm_id=self.vm_id, handoff=self.id, token=token)
        ask(self.destination, request, messages.Handoff)

    def forget(self, receipt: bytes) -> None:
        """Brings the receipt."""
        request = messages.SendForget(vm_id=self.vm_id, handoff=self.id, receipt=receipt)
        ask(self.source, request, messages.Handoff)

    def move(self, memory: bytes = b"") -> None:
        """All of it."""
        self.send_memory(memory)
        self.send_final(self.stop())
        self.receive(self.finish())

    def close(self) -> None:
        """Ends the connections; once more does nothing."""
        self.carrier.close()
        for connection in (self._in, self._out):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._taker.join(PATIENCE_S)
