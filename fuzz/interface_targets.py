"""Targets for the two ends of VM memory: the SP's interface under a hostile VM, the guest's driver under a hostile host."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tests import tpm_commands as tpm

from fuzz.direct_machine import Keys, Machine, machine
from fuzz.program import Program
from fuzz.target import Target
from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import crb, mailbox
from spvtpm.wire.crb import AttachError, CtrlReq, LocCtrl, Register
from spvtpm.wire.errors import InterfaceError, MailboxError
from spvtpm.wire.ivshmem import Offer
from spvtpm.wire.mailbox import Direction, Session

_MOST_STEPS = 24
_VALUES = (0, 1, 2, 3, 4, 8, 79, 80, 4096, 4176, 4177, 0x1000, 0x2000, 0x7FFF, 0x8000, 1 << 31, (1 << 32) - 1)
_ADDRESSES = (crb.COMMAND_ADDRESS, crb.COMMAND_ADDRESS, crb.DATA_BUFFER, 0x6000, crb.RESPONSE_ADDRESS, 0x2001)
_BORDERS = (0, 0x4C, 0x7C, 0xF80, 0xFB0, 0x1000, 0x1FFC, 0x6FB0, 0x7F00, 0x7FB0, 0x7FFC)


class _Vm:
    """The VM that owns the key, and whoever else writes its memory.

    Args:
        machine: its interface.
        program: says what they do.
    """

    def __init__(self, machine: Machine, program: Program) -> None:
        self._machine = machine
        self._program = program
        self._clients: list[tuple[Keys, Session]] = []
        self._sequences: dict[Keys, int] = {}
        self._frames: list[tuple[int, bytes]] = []
        self._steps: tuple[Callable[[], None], ...] = (
            *(self._write_register, self._write_memory, self._attach, self._seal, self._replay, self._start),
            *(self._serve, machine.park_and_wake, self._power_on, self._place_response, self._command, self._command),
            self._again,
        )

    def step(self) -> None:
        """What the program says."""
        self._program.choose(self._steps)()

    def _store(self, register: int, value: int) -> None:
        crb.U32.pack_into(self._machine.memory, register, value & 0xFFFFFFFF)

    def _write_register(self) -> None:
        program = self._program
        register = program.choose((*Register, Register.CTRL_RSP_ADDR + 4, 0x04))
        self._store(register, program.choose((program.choose(_VALUES), program.number(4))))

    def _write_memory(self) -> None:
        offset = self._program.below(crb.MEMORY_BYTES)
        piece = self._program.take(self._program.below(128))[: crb.MEMORY_BYTES - offset]
        self._machine.memory[offset : offset + len(piece)] = piece

    def _attach(self) -> None:
        self._clients.append(self._machine.attach(self._program.take(1).ljust(32, b"n")))

    def _address(self) -> int:
        program = self._program
        if program.below(4):
            return program.choose(_ADDRESSES)
        return program.choose((program.choose(_BORDERS), program.number(2), program.number(8)))

    def _seal(self) -> None:
        """A genuine frame, which is then perhaps damaged or laid elsewhere."""
        program = self._program
        if not self._clients:
            self._attach()
        keys, session = program.choose(self._clients[-4:])
        following = self._sequences.get(keys, 0) + 1
        sequence = program.choose((following, following, following, program.number(), program.number(8)))
        sequence = max(1, min(sequence, mailbox.MAX_SEQUENCE))
        payload = program.choose((tpm.get_random(8), tpm.create_primary(tpm.ecc_p256()), program.take(20) or b"\0"))
        payload = payload.ljust(program.choose((1, 1, 1, 1 + program.below(4096))), b"\0")
        address = self._address()
        frame = session.seal(Direction.COMMAND, sequence, address, payload)
        self._sequences[keys] = sequence
        self._machine.sealed.setdefault((keys, sequence, address), set()).add(payload)
        self._frames.append((address, frame))
        self._place(address, program.damage(frame))

    def _place(self, address: int, frame: bytes) -> None:
        memory = self._machine.memory
        if address < crb.MEMORY_BYTES:
            piece = frame[: crb.MEMORY_BYTES - address]
            memory[address : address + len(piece)] = piece
        room = self._program.choose((crb.COMMAND_BYTES, mailbox.MAX_FRAME_BYTES, len(frame), self._program.number(4)))
        self._store(Register.CTRL_CMD_LADDR, address)
        self._store(Register.CTRL_CMD_HADDR, address >> 32)
        self._store(Register.CTRL_CMD_SIZE, room)

    def _replay(self) -> None:
        if self._frames:
            address, frame = self._program.choose(self._frames)
            self._place(self._program.choose((address, address, self._address())), frame)

    def _place_response(self) -> None:
        program = self._program
        room = program.choose((mailbox.MAX_FRAME_BYTES, crb.RESPONSE_BYTES, program.below(4200), program.number(4)))
        crb.U32.pack_into(self._machine.memory, Register.CTRL_RSP_SIZE, room)
        address = self._address()
        self._store(Register.CTRL_RSP_ADDR, address)
        self._store(Register.CTRL_RSP_ADDR + 4, address >> 32)

    def _start(self) -> None:
        self._store(Register.LOC_CTRL, LocCtrl.REQUEST_ACCESS)
        self._store(Register.CTRL_REQ, CtrlReq.CMD_READY)
        self._store(Register.CTRL_START, crb.START)
        self._machine.ring()

    def _serve(self) -> None:
        program, tpm_ = self._program, self._machine.tpm
        size = program.choose((1, 10, 10, 10, 4096, 1 + program.below(4096)))
        answers: tuple[bytes | int, ...] = (program.take(1).ljust(size, b"r"), program.take(1).ljust(size, b"r"), 0, -1)
        tpm_.answer = program.choose(answers)
        tpm_.changes_state = program.below(4) == 0
        verdicts: tuple[bytes | AttachError, ...] = (
            b"answer".ljust(size, b"!"),
            AttachError.STORAGE,
            b"too long" * 600,
            b"",
        )
        self._machine.serve(hold=program.below(4) == 0, verdict=program.choose(verdicts))

    def _power_on(self) -> None:
        if self._program.below(4) == 0:
            self._machine.power_on()

    def _again(self) -> None:
        self._replay()
        self._start()
        self._serve()

    def _command(self) -> None:
        self._seal()
        self._start()
        self._serve()


def fuzz_direct(data: bytes) -> None:
    """The direct interface: a VM's writes, frames and rings; what must hold is checked after every step."""
    program = Program(data)
    with machine() as under_test:
        vm = _Vm(under_test, program)
        for _ in range(_MOST_STEPS):
            if not program:
                break
            vm.step()


_VM_KEY = b"k" * 32
_BOOT_ID = b"b" * 16


class _HostileHost(InterfaceMemory):
    """Memory whose owner, instead of ringing, does what the program says.

    Attributes:
        program: says so.
        genuine: responses that the SP, which has the key, has sealed for the command under way.
    """

    program: Program
    genuine: set[bytes]

    def wait(self, timeout_s: float) -> bool:  # noqa: ARG002 - nobody waits
        if not self.program:
            raise InterfaceError("the secure processor has gone")
        for _ in range(1 + self.program.below(3)):
            self.program.choose((self._write, self._answer, self._answer, self._end))()
        return True

    def _write(self) -> None:
        offset = self.program.choose((0, crb.ATTACH_OFFSET, crb.RESPONSE_ADDRESS, self.program.below(crb.MEMORY_BYTES)))
        piece = self.program.take(self.program.below(80))[: crb.MEMORY_BYTES - offset]
        self.memory[offset : offset + len(piece)] = piece

    def _end(self) -> None:
        status = self.program.choose((0, 0, 1, 2, 3))
        crb.REQ_TO_START.pack_into(self.memory, Register.CTRL_REQ, 0, status, 0, self.program.choose((0, 0, 0, 1)))

    def _answer(self) -> None:
        """A response sealed by the SP, or by another one, for this command or another one; perhaps damaged."""
        program = self.program
        frame = self.memory[crb.COMMAND_ADDRESS : crb.COMMAND_ADDRESS + mailbox.MAX_FRAME_BYTES]
        try:
            header = mailbox.parse_header(frame, Direction.COMMAND)
        except MailboxError:
            return  # the program has overwritten it
        key = program.choose((_VM_KEY, _VM_KEY, _VM_KEY, b"o" * 32))
        boot_key = mailbox.derive_boot_key(key, b"v" * 16, _BOOT_ID)
        session = mailbox.derive_session(boot_key, b"s" * 32, header.vm_nonce)
        direction = program.choose((Direction.RESPONSE, Direction.RESPONSE, Direction.RESPONSE, Direction.COMMAND))
        sequence = program.choose((header.sequence, header.sequence, header.sequence, 1 + program.below(8)))
        address = program.choose((crb.RESPONSE_ADDRESS, crb.RESPONSE_ADDRESS, crb.RESPONSE_ADDRESS, 0x6000))
        payload = program.take(1 + program.below(20)).ljust(program.choose((1, 10, 4096)), b"\0")
        answer = session.seal(direction, sequence, address, payload)
        if (key, direction, address) == (_VM_KEY, Direction.RESPONSE, crb.RESPONSE_ADDRESS):
            self.genuine.add(sequence.to_bytes(8, "little") + payload)
        damaged = program.damage(answer)[: crb.RESPONSE_BYTES]
        self.memory[crb.RESPONSE_ADDRESS : crb.RESPONSE_ADDRESS + len(damaged)] = damaged
        self._end()


@contextmanager
def _hostile_host(program: Program) -> Iterator[_HostileHost]:
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("fuzz")
    os.ftruncate(memory, crb.MEMORY_BYTES)
    doorbells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    with theirs, _HostileHost(ours, Offer(memory, *doorbells)) as host:
        host.program, host.genuine = program, set()
        attach = crb.Attach(crb.ATTACH_MAGIC, crb.LAYOUT_VERSION, 0, b"v" * 16, _BOOT_ID, b"s" * 32)
        crb.ATTACH.pack_into(host.memory, crb.ATTACH_OFFSET, *attach)
        yield host


def fuzz_driver(data: bytes) -> None:
    """The guest's driver: what it gives out was sealed by the SP for this very command, or it raises what it names."""
    program = Program(data)
    with _hostile_host(program) as host:
        if program.below(8) == 0:
            page = program.take(64)
            host.memory[crb.ATTACH_OFFSET : crb.ATTACH_OFFSET + len(page)] = page
        try:
            driver = CrbDriver(host, _VM_KEY)
        except InterfaceError:
            return
        sequence = 0
        while program and sequence < _MOST_STEPS:
            sequence += 1
            command = program.choose((tpm.get_random(8), tpm.startup(), b"c" * 4096))
            try:
                response = driver.transmit(command)
            except (InterfaceError, MailboxError) as error:
                str(error).encode()
            else:
                assert sequence.to_bytes(8, "little") + response in host.genuine, (
                    "a response is the SP's, to this command"
                )


def _seeds_direct() -> Sequence[bytes]:
    """Programs for `_Vm`, which the numbers of its steps begin; each other number is a choice, in the order it is made."""
    sealed = bytes([0, *bytes(9), 0, *bytes(20), 0, 0, 0, 0, 1, 0, 0, *bytes(4), 0])
    served = bytes([0, 0, 1, 0, 0, 0, 1, 1, 0])
    first, again = b"\x0a\1" + sealed + served, b"\x0a" + sealed + served
    moved = b"\3\1" + sealed + bytes([12, 0, 1, 3, 2, *bytes(5)]) + served
    over_registers = bytes([9, 0, 1, *bytes(4), 2, *bytes(13)]) + first
    two_sessions = first + b"\2\2\x0a\1" + sealed[1:] + served + bytes([12, 0, 1, 0, 0, *bytes(5)]) + served
    return (first + again * 7, first + b"\7" + again, moved, over_registers, two_sessions)


def _seeds_driver() -> Sequence[bytes]:
    answered = bytes([0, 0, 1, *bytes(14)])
    return (b"\1" + answered, b"\1" + answered * 3, b"\1\0\0\3\2\0", b"\0SPVTPM\0\1" + bytes(60))


INTERFACE_TARGETS = (
    Target(
        "direct", "the SP's direct interface under a hostile VM", fuzz_direct, _seeds_direct, examples=500, longest=1024
    ),
    Target("driver", "the guest's driver under a hostile host", fuzz_driver, _seeds_driver, examples=150, longest=1024),
)
