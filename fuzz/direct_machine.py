"""A direct interface on real memory and doorbells, a TPM that answers as it is told, and what must hold after every step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from mmap import mmap
from typing import NamedTuple

from spvtpm.processor.interfaces.direct import DirectEvent, DirectInterface, TpmAccess
from spvtpm.processor.worker.messages import DirectPort, InterfaceSnapshot, Parked, encode, parse_from_worker
from spvtpm.wire import crb, mailbox
from spvtpm.wire.crb import AttachError, Register
from spvtpm.wire.mailbox import Direction, Session

VM_ID = b"v" * 16
_OWN_REGISTERS = (
    *(Register.LOC_STATE, Register.LOC_CTRL, Register.LOC_STS, Register.CTRL_REQ, Register.CTRL_STS),
    *(Register.CTRL_CANCEL, Register.CTRL_START, crb.ATTACH_ERROR_OFFSET),
)
"""What the SP may write at any time; all else only when it opens a session or answers."""

_EXECUTE = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.POINTER(ctypes.c_uint8), ctypes.c_uint32, ctypes.c_void_p)


class Keys(NamedTuple):
    """What the keys of a session are made of."""

    boot_key: bytes
    sp_nonce: bytes
    vm_nonce: bytes


class Tpm:
    """A `direct_execute_function` that answers as it is told.

    Attributes:
        answer: what it gives next: response bytes, or a number below 1.
        changes_state: whether the next command changes the permanent state.
        seen: the commands since `seen` was last cleared.
    """

    def __init__(self) -> None:
        self.answer: bytes | int = b"\0"
        self.changes_state = False
        self.seen: list[bytes] = []
        self._stores = ctypes.c_uint32(0)
        self._function = _EXECUTE(self._execute)
        execute = ctypes.cast(self._function, ctypes.c_void_p).value or 0
        self.access = TpmAccess(execute, ctypes.addressof(self._stores))

    def _execute(self, command: object, size: int, response: int) -> int:
        self.seen.append(ctypes.string_at(command, size))  # type: ignore[arg-type]  # a pointer
        self._stores.value += self.changes_state
        if isinstance(self.answer, int):
            return self.answer
        ctypes.memmove(response, self.answer, len(self.answer))
        return len(self.answer)


@dataclass(slots=True)
class Machine:
    """One vTPM's interface under test.

    Attributes:
        memory: shared with the VM, that is with the fuzzer.
        doorbells: the SP's and the VM's.
        control: readable from the start.
        tpm: executes commands.
        boot_key: of the boot under way.
        sealed: payloads that the VM has sealed, by keys, sequence and address.
    """

    memory: mmap
    doorbells: tuple[int, int]
    control: int
    tpm: Tpm = field(default_factory=Tpm)
    boot_key: bytes = b"\0" * 32
    sealed: dict[tuple[Keys, int, int], set[bytes]] = field(default_factory=dict)
    _interface: DirectInterface = field(init=False)
    _boots: int = 0
    _session: Keys | None = None
    _executed: set[tuple[Keys, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.power_on()

    def power_on(self) -> None:
        """A new boot: frames of the one before are dead."""
        self._boots += 1
        self.boot_key = self._boots.to_bytes(32, "little")
        self._session = None
        self._construct(None)

    def park_and_wake(self) -> None:
        """The interface goes through the messages of parking into a new worker's hands."""
        message = parse_from_worker(encode(Parked(b"volatile", self._interface.snapshot())))
        assert isinstance(message, Parked) and message.snapshot is not None, "parking keeps the snapshot"
        before = bytes(self.memory)
        self._construct(message.snapshot)
        assert before == bytes(self.memory), "waking writes nothing into the memory"
        assert self._interface.snapshot() == message.snapshot, "an interface wakes as it was parked"

    def _construct(self, snapshot: InterfaceSnapshot | None) -> None:
        port = DirectPort(VM_ID, self._boots.to_bytes(16, "little"), self.boot_key, snapshot)
        self._interface = DirectInterface(self.memory, self.doorbells, port, self.tpm.access)

    def attach(self, vm_nonce: bytes) -> tuple[Keys, Session]:
        """A client of the VM begins a session, with the nonce that the memory offers."""
        offered = crb.Attach._make(crb.ATTACH.unpack_from(self.memory, crb.ATTACH_OFFSET))
        keys = Keys(self.boot_key, offered.sp_nonce, vm_nonce)
        return keys, mailbox.derive_session(*keys)

    def ring(self) -> None:
        """The VM's doorbell."""
        with suppress(BlockingIOError):
            os.eventfd_write(self.doorbells[0], 1)

    def serve(self, *, hold: bool, verdict: bytes | AttachError) -> None:
        """Serves what the memory holds, ends the command if one is handed out, and checks all that must hold.

        Args:
            hold: as for `DirectInterface.serve`.
            verdict: the response to a command that is handed out, or why it gets none.
        """
        interface = self._interface
        before, nonce, executed = bytes(self.memory), interface.snapshot().sp_nonce, interface.executed
        self.tpm.seen.clear()
        event = interface.serve(self.control, hold=hold)
        answer = self.tpm.answer if event is not DirectEvent.COMMAND else verdict
        if event is DirectEvent.COMMAND:
            self.tpm.seen.append(interface.command)
        if event in (DirectEvent.COMMAND, DirectEvent.STORED, DirectEvent.FAILED):
            if event is DirectEvent.STORED:
                assert interface.response == self.tpm.answer, "the response that waits is the TPM's"
            if event is DirectEvent.FAILED or not isinstance(verdict, bytes):
                interface.refuse(verdict if isinstance(verdict, AttachError) else AttachError.TPM_FAILED)
            else:
                interface.answer(interface.response if event is DirectEvent.STORED else verdict)
        count = interface.executed - executed
        assert count == len(self.tpm.seen) <= 1, "one start executes one command, and counts it"
        self._check(before, nonce, answer if count and interface.error is AttachError.NONE else None)

    def _check(self, before: bytes, nonce: bytes, answer: object) -> None:
        snapshot = self._interface.snapshot()
        changed = bytearray(before)
        allowed = [(offset, 4) for offset in _OWN_REGISTERS]
        if snapshot.sp_nonce != nonce:
            assert snapshot.session is not None, "a nonce is spent by a session"
            self._session = Keys(self.boot_key, nonce, snapshot.session[2])
            allowed.append((crb.ATTACH_NONCE_OFFSET, mailbox.NONCE_BYTES))
        if self.tpm.seen:
            self._check_executed(before, self.tpm.seen[0], snapshot.sequence)
        if answer is not None:
            assert isinstance(answer, bytes), "what failed is not answered"
            allowed.append(self._check_response(before, answer, snapshot.sequence))
        for offset, size in allowed:
            changed[offset : offset + size] = self.memory[offset : offset + size]
        assert bytes(changed) == bytes(self.memory), "nothing is written but registers of the SP and the response"

    def _check_executed(self, before: bytes, command: bytes, sequence: int) -> None:
        assert self._session is not None, "a command is executed in a session"
        address = crb.Registers._make(crb.REGISTERS.unpack_from(before)).cmd_addr
        sealed = self.sealed.get((self._session, sequence, address), ())
        assert command in sealed, "what is executed was sealed by the VM in this session, for this place"
        place = self._session, sequence
        assert place not in self._executed, "no sequence of a session is executed twice"
        self._executed.add(place)

    def _check_response(self, before: bytes, answer: bytes, sequence: int) -> tuple[int, int]:
        registers = crb.Registers._make(crb.REGISTERS.unpack_from(before))
        address, size = registers.rsp_addr, mailbox.OVERHEAD_BYTES + len(answer)
        in_data_buffer = crb.DATA_BUFFER <= address <= crb.ATTACH_OFFSET - size
        in_frames = crb.COMMAND_ADDRESS <= address <= crb.MEMORY_BYTES - size
        assert size <= registers.rsp_size and (in_data_buffer or in_frames), "a response lies in its room"
        assert self._session is not None, "a response belongs to a session"
        frame = self.memory[address : address + size]
        header = mailbox.parse_header(frame, Direction.RESPONSE)
        assert header.sequence == sequence, "a response has the sequence of its command"
        opened = mailbox.derive_session(*self._session).open(Direction.RESPONSE, header, address, frame)
        assert opened == answer, "a response opens to what the TPM answered"
        return address, size


@contextmanager
def machine() -> Iterator[Machine]:
    """A machine, powered on; its descriptors are closed at the end."""
    descriptors = [os.eventfd(start, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for start in (0, 0, 1)]
    memory = mmap(-1, crb.MEMORY_BYTES)
    try:
        yield Machine(memory, (descriptors[0], descriptors[1]), descriptors[2])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(BufferError):  # the interface still refers to it: unmapped when that goes
            memory.close()
