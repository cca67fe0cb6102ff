"""A vTPM that moves to another chip: for how long it answers nobody, and how fast the memory goes that comes with it."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tests.harness import RunningSp
from tests.processor.migration.two_chips import Memory, TwoChips, connect
from tests.tpm_commands import checked, get_random

from benchmarks.instances import fill_nv, full_vtpm
from benchmarks.report import Figure, Row, Section
from benchmarks.roundtrip import Progress, no_garbage_collection
from benchmarks.swtpm import Swtpm
from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.wire import messages
from spvtpm.wire.errors import InterfaceError
from spvtpm.wire.framing import encode_frame
from spvtpm.wire.memory_records import PAGE_BYTES
from spvtpm.wire.migration import Link, MemoryIn, MemoryOut

_SAMPLES = 40
_TARGET_MS = 20.0
_TARGET_MULTIPLE = 2.0
"""Memory at half the speed of the cipher alone, at least: at most twice its time."""

_LOOK_S = 0.0001
_PAUSE_S = 0.05
"""Between two moves: long enough for a spare worker, and for the guest to be at work."""

_MEMORY = bytes(4 * PAGE_BYTES)
_ROUND_PAGES = 256
_BUFFER_BYTES = 1 << 20
_MIB = 1 << 20
_clock = time.perf_counter_ns
_Reply = TypeVar("_Reply", bound=messages.Reply)


class _Host:
    """A secure processor, and its hypervisor's connection to it, which stays open."""

    def __init__(self, sp: RunningSp, cleanup: ExitStack) -> None:
        self.sp = sp
        self._client = cleanup.enter_context(SecureProcessorClient(sp.socket))

    def ask(self, request: messages.Request, kind: type[_Reply]) -> _Reply:
        """One command."""
        reply = self._client.call(request)
        assert isinstance(reply, kind), reply
        return reply


@dataclass(frozen=True, slots=True)
class _Vm:
    """A VM, and the key that it has wherever it is."""

    vm_id: uuid.UUID
    key: bytes


class _Carrier:
    """Carries the bytes of a link both ways as they come: what is a frame on one side is one on the other."""

    def __init__(self, ends: tuple[socket.socket, socket.socket]) -> None:
        self._ends = ends
        self._threads = [threading.Thread(target=self._carry, args=pair) for pair in (ends, ends[::-1])]
        for thread in self._threads:
            thread.start()

    def _carry(self, source: socket.socket, destination: socket.socket) -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        with suppress(OSError):
            while count := source.recv_into(buffer):
                destination.sendall(buffer[:count])

    def close(self) -> None:
        """Ends the link."""
        _shut(*self._ends)
        for thread in self._threads:
            thread.join()


class _Taker:
    """Takes the memory at the destination."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def take(self, count: int) -> None:
        """So many bytes."""
        while count > 0:
            taken = self._connection.recv_into(self._buffer[:count])
            assert taken, "the memory has ended"
            count -= taken


def _shut(*connections: socket.socket) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


class _Move:
    """One handoff, with its link and the connections for the memory."""

    def __init__(self, source: _Host, destination: _Host, vm: _Vm, revoked: bytes) -> None:
        self._source, self._destination, self.vm_id = source, destination, vm.vm_id
        self.id = source.ask(messages.SendStart(vm_id=vm.vm_id), messages.Handoff).handoff
        destination.ask(messages.ReceiveStart(vm_id=vm.vm_id, handoff=self.id), messages.Handoff)
        hosts = source.sp, destination.sp
        self._carrier = _Carrier((connect(hosts[0], Link(self.id, revoked)), connect(hosts[1], Link(self.id, revoked))))
        self.memory_in, self._memory_out = connect(hosts[0], MemoryIn(self.id)), connect(hosts[1], MemoryOut(self.id))
        self._taker = _Taker(self._memory_out)
        self.memory = Memory(vm.key, self.id)

    def feed(self, frames: bytes, times: int = 1) -> int:
        """Has frames of memory go through, again and again; nanoseconds until the last one is there."""
        begin = _clock()
        feeder = threading.Thread(target=self._give, args=(frames, times))
        feeder.start()
        self._taker.take(len(frames) * times)
        took = _clock() - begin
        feeder.join()
        return took

    def _give(self, frames: bytes, times: int) -> None:
        for _ in range(times):
            self.memory_in.sendall(frames)

    def finish(self) -> tuple[int, int]:
        """What a hypervisor commands, one after the other; nanoseconds of the stop, and until the vTPM is given up."""
        begin = _clock()
        request: messages.Request = messages.SendStop(vm_id=self.vm_id, handoff=self.id)
        nonce = self._source.ask(request, messages.SendStopped).stop_nonce
        stopped = _clock()
        self.memory_in.sendall(encode_frame(self.memory.final(nonce, len(_MEMORY))))
        request = messages.SendFinish(vm_id=self.vm_id, handoff=self.id)
        token = self._source.ask(request, messages.HandoffToken).token
        finished = _clock()
        request = messages.ReceiveFinish(vm_id=self.vm_id, handoff=self.id, token=token)
        receipt = self._destination.ask(request, messages.HandoffToken).token
        request = messages.SendForget(vm_id=self.vm_id, handoff=self.id, receipt=receipt)
        self._source.ask(request, messages.Handoff)
        return stopped - begin, finished - stopped

    def cancel(self) -> None:
        """The vTPM stays."""
        request = messages.SendCancel(vm_id=self.vm_id, handoff=self.id)
        token = self._source.ask(request, messages.HandoffToken).token
        self._destination.ask(messages.ReceiveCancel(vm_id=self.vm_id, handoff=self.id, token=token), messages.Handoff)

    def close(self) -> None:
        """Ends its connections."""
        self._carrier.close()
        _shut(self.memory_in, self._memory_out)


class _Guest:
    """What runs in the VM: asks its vTPM at the source until that answers no more, then at the destination as soon as it can."""

    def __init__(self, source: RunningSp, destination: RunningSp, vm: _Vm) -> None:
        self._key = vm.key
        self._last = self._first = 0
        self._at_source = threading.Thread(target=self._use, args=(source.interface(vm.vm_id),))
        self._at_destination = threading.Thread(target=self._go_on, args=(destination.interface(vm.vm_id),))
        self._at_source.start()
        self._at_destination.start()

    def _use(self, interface: Path) -> None:
        with InterfaceMemory.connect(interface) as memory, suppress(InterfaceError):
            driver = CrbDriver(memory, self._key)
            while True:
                checked(driver.transmit(get_random(32)))
                self._last = _clock()

    def _go_on(self, interface: Path) -> None:
        with _connect(interface) as memory:
            checked(CrbDriver(memory, self._key).transmit(get_random(32)))
            self._first = _clock()

    def blackout(self) -> int:
        """Nanoseconds between the last answer at the source and the first one at the destination, once it is there."""
        self._at_source.join()
        self._at_destination.join()
        return self._first - self._last


def _connect(interface: Path) -> InterfaceMemory:
    """As soon as it is there."""
    while True:
        if interface.exists():
            with suppress(InterfaceError):  # nobody listens at it yet
                return InterfaceMemory.connect(interface)
        time.sleep(_LOOK_S)


def _frames(records: list[bytes]) -> bytes:
    return b"".join(encode_frame(record) for record in records)


def _blackout(source: _Host, destination: _Host, vm: _Vm, revoked: bytes) -> tuple[int, int, int]:
    """Nanoseconds: of the blackout, of the stop, and from there until the source has given the vTPM up."""
    move = _Move(source, destination, vm, revoked)
    try:
        move.feed(_frames(move.memory.pages(_MEMORY)))
        guest = _Guest(source.sp, destination.sp, vm)
        time.sleep(_PAUSE_S)
        steps = move.finish()
        return guest.blackout(), *steps
    finally:
        move.close()


def _swtpm_blackout(path: str, swtpm: Swtpm, state: Path) -> tuple[int, Swtpm]:
    """Nanoseconds between the last answer of one swtpm and the first of the next, on a copy of its state."""
    checked(swtpm.transmit(get_random(32)))
    begin = _clock()
    swtpm.suspend()
    shutil.copytree(swtpm.state, state, ignore=shutil.ignore_patterns("data", "ctrl", ".lock"))
    following = Swtpm(path, state, goes_on=True).connect()
    checked(following.transmit(get_random(32)))
    return _clock() - begin, following


def _blackouts(chips: TwoChips, swtpm_path: str, scratch: Path, samples: int) -> list[Row]:
    blackouts, stops, finishes, theirs = list[int](), list[int](), list[int](), list[int]()
    vm_id = full_vtpm(chips.a)
    vm = _Vm(vm_id, chips.a.key(vm_id))
    state = scratch / "moving"
    state.mkdir()
    swtpm = Swtpm(swtpm_path, state).connect()
    fill_nv(swtpm.transmit)
    with ExitStack() as cleanup, no_garbage_collection():
        here, there = _Host(chips.a, cleanup), _Host(chips.b, cleanup)
        for number in range(samples):
            blackout, stop, finish = _blackout(here, there, vm, chips.revoked)
            blackouts.append(blackout)
            stops.append(stop)
            finishes.append(finish)
            here, there = there, here
            blackout, following = _swtpm_blackout(swtpm_path, swtpm, scratch / f"moving-{number}")
            swtpm.stop()
            swtpm = following
            theirs.append(blackout)
            os.sync()
    swtpm.stop()
    ours = Figure.of_times(blackouts, "ms")
    return [
        Row("blackout of a full vTPM that moves", "ms", ours, target=_TARGET_MS, note=_BLACKOUT),
        Row("  the same beside swtpm", "ms", ours, Figure.of_times(theirs, "ms"), note=_SWTPM),
        Row("  of it: SendStop → reply", "ms", Figure.of_times(stops, "ms")),
        Row("  of it: SendFinish → reply", "ms", Figure.of_times(finishes, "ms"), note=_FINISH),
    ]


_BLACKOUT = "last answer at the source → first answer at the destination; the memory is there already; all durable on both sides"
_SWTPM = (
    "swtpm's control commands STORE_VOLATILE and SHUTDOWN, copy of the state directory on one disk, spawn … answered"
)
_FINISH = "the destination has loaded it, and both chips have counted"


def _cipher_alone(times: int) -> int:
    """Nanoseconds of AES-256-GCM over a round of pages, on one core."""
    cipher, nonce = AESGCM(bytes(32)), bytes(12)
    pages = [os.urandom(PAGE_BYTES) for _ in range(_ROUND_PAGES)]
    begin = _clock()
    for _ in range(times):
        for page in pages:
            cipher.encrypt(nonce, page, None)
    return _clock() - begin


def _cpu_ms(pid: int) -> float:
    """Processor time of a process until now, in user mode and in the kernel. Source: proc(5), stat, fields 14 and 15."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:13]) * 1000 / os.sysconf("SC_CLK_TCK")


def _stream(chips: TwoChips, rounds: int, times: int) -> list[Row]:
    """The memory of a VM, `rounds` times; each time its pages are `times` times the same few."""
    vm_id = chips.a.launch()
    streams, ciphers = list[int](), list[int]()
    processes = {"source": chips.a.process.pid, "destination": chips.b.process.pid, "carrier and drivers": os.getpid()}
    spent = dict.fromkeys(processes, 0.0)
    with ExitStack() as cleanup, no_garbage_collection():
        source, destination = _Host(chips.a, cleanup), _Host(chips.b, cleanup)
        move = _Move(source, destination, _Vm(vm_id, chips.a.key(vm_id)), chips.revoked)
        cleanup.callback(move.close)
        frames = _frames(move.memory.pages(os.urandom(_ROUND_PAGES * PAGE_BYTES)))
        move.feed(frames)
        for _ in range(rounds):
            before = {name: _cpu_ms(pid) for name, pid in processes.items()}
            streams.append(move.feed(frames, times))
            for name, pid in processes.items():
                spent[name] += _cpu_ms(pid) - before[name]
            ciphers.append(_cipher_alone(times))
        move.cancel()
    chips.a.destroy(vm_id)
    mib = _ROUND_PAGES * PAGE_BYTES * times / _MIB
    stream, cipher = Figure.of_times(streams, "ms"), Figure.of_times(ciphers, "ms")
    speeds = [Figure(mib * 1000 / figure.p50, samples=rounds) for figure in (stream, cipher)]
    per_gib = 1024 / mib
    return [
        Row("memory of a VM that moves", "MiB/s", speeds[0], note=_STREAM.format(rounds, mib)),
        Row("AES-256-GCM of its pages alone, one core", "MiB/s", speeds[1]),
        Row(
            "memory's time in multiples of the cipher's alone", "×", _multiple(stream, cipher), target=_TARGET_MULTIPLE
        ),
        Row("  processor time per GiB: cipher alone", "ms", Figure(cipher.p50 * per_gib)),
        *(
            Row(f"  processor time per GiB: {name}", "ms", Figure(time_ms / rounds * per_gib))
            for name, time_ms in spent.items()
        ),
    ]


def _multiple(stream: Figure, cipher: Figure) -> Figure:
    return Figure(stream.p50 / cipher.p50, samples=stream.samples)


_STREAM = "driver → source → carrier → destination → driver, {} × {:.0f} MiB, all on this machine's cores"


def measure_migration(swtpm_path: str, scratch: Path, config: str, *, quick: bool, progress: Progress) -> Section:
    """Two chips of their own.

    Args:
        swtpm_path: of the program.
        scratch: where swtpm's states can be made.
        config: of both chips.
        quick: fewer samples.
        progress: is told what is going on.
    """
    with TwoChips(config=config) as chips:
        progress("a full vTPM moves")
        rows = _blackouts(chips, swtpm_path, scratch, _SAMPLES // 2 if quick else _SAMPLES)
        progress("memory of a VM that moves")
        rows += _stream(chips, 4 if quick else 8, 16)
    return Section("A vTPM that moves to another chip", rows, [_LIMITS])


_LIMITS = (
    "Memory: the pages are sealed already; TLS seals and opens them once more, with the system's OpenSSL, in 16 KiB. The cipher "
    "alone is that of cryptography's OpenSSL. Each byte goes through four sockets; all share the cores."
)
