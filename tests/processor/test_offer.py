"""The socket on which a VM gets its vTPM's interface: one holder, a queue, and memory that nobody can cut short."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from spvtpm.files.unix_sockets import MAX_SOCKET_PATH_BYTES
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.processor.interfaces.offer import MAX_CONNECTIONS
from spvtpm.processor.unix_sockets import listen
from spvtpm.wire import crb, messages
from spvtpm.wire.errors import InterfaceError, ResourceError
from spvtpm.wire.ivshmem import MESSAGE_BYTES, REFUSAL, Offer, OfferParser
from tests import tpm_commands as tpm
from tests.harness import RunningSp


@pytest.fixture(scope="module")
def sp() -> Iterator[RunningSp]:
    """A running SP for all tests of this module."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path, RunningSp(Path(path) / "sp") as running:
        yield running


@pytest.fixture
def vm_id(sp: RunningSp) -> Iterator[uuid.UUID]:
    """A running VM."""
    vm_id = sp.launch()
    yield vm_id
    sp.destroy(vm_id)


class Visitor:
    """A process of the VM that connects to the interface's socket, and perhaps waits."""

    def __init__(self, sp: RunningSp, vm_id: uuid.UUID) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(sp.interface(vm_id)))
        self.socket.settimeout(60)
        # The answer to a command that was given after this connection shows that the SP has seen the connection.
        sp.call(messages.GetStatus())

    def has_been_answered(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    @contextmanager
    def offer(self) -> Iterator[Offer]:
        """Waits for the interface."""
        parser, received = OfferParser(), list[int]()
        try:
            while True:
                message, descriptors, _flags, _address = socket.recv_fds(self.socket, MESSAGE_BYTES, 1)
                received += descriptors
                offer = parser.feed(message, descriptors[0] if descriptors else None)
                if offer is not None:
                    yield offer
                    return
        finally:
            for descriptor in received:
                os.close(descriptor)

    def gets_it(self) -> bool:
        with self.offer() as offer:
            return os.fstat(offer.memory).st_size == crb.MEMORY_BYTES

    def is_turned_away(self) -> bool:
        return self.socket.recv(MESSAGE_BYTES) in (REFUSAL, b"")

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.socket.close()


def is_connected(sp: RunningSp, vm_id: uuid.UUID) -> bool:
    vtpm = sp.vm(vm_id).vtpm
    assert vtpm is not None
    return vtpm.connected


# One at a time


@pytest.mark.claim("C1")
def test_one_process_holds_the_interface_and_the_others_follow_in_their_order(sp: RunningSp, vm_id: uuid.UUID) -> None:
    with ExitStack() as stack:
        visitors = [stack.enter_context(Visitor(sp, vm_id)) for _ in range(MAX_CONNECTIONS)]
        for turn, visitor in enumerate(visitors):
            assert visitor.gets_it()
            assert is_connected(sp, vm_id)
            assert not any(later.has_been_answered() for later in visitors[turn + 1 :])
            visitor.socket.close()


@pytest.mark.attack("A23")
def test_more_than_may_wait_are_turned_away_and_the_others_keep_their_places(sp: RunningSp, vm_id: uuid.UUID) -> None:
    with ExitStack() as stack:
        visitors = [stack.enter_context(Visitor(sp, vm_id)) for _ in range(MAX_CONNECTIONS)]
        for _ in range(3):
            with Visitor(sp, vm_id) as late:
                assert late.is_turned_away()
            with pytest.raises(InterfaceError, match="refused this process"):
                InterfaceMemory.connect(sp.interface(vm_id))
        assert "too many wait" in sp.log()
        for visitor in visitors:
            assert visitor.gets_it()
            visitor.socket.close()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))


def test_a_holder_that_says_anything_gives_the_interface_back(sp: RunningSp, vm_id: uuid.UUID) -> None:
    with Visitor(sp, vm_id) as talker, Visitor(sp, vm_id) as patient:
        assert talker.gets_it()
        talker.socket.sendall(b"hello")
        assert patient.gets_it()


HOLD = """
import sys
from pathlib import Path
from spvtpm.guest.memory import InterfaceMemory
with InterfaceMemory.connect(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_holder_that_is_killed_gives_the_interface_back(sp: RunningSp, vm_id: uuid.UUID) -> None:
    command = [sys.executable, "-c", HOLD, str(sp.interface(vm_id))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with Visitor(sp, vm_id) as patient:
            assert not patient.has_been_answered()
            holder.kill()
            assert patient.gets_it()


def test_one_that_left_while_it_waited_is_passed_over(sp: RunningSp, vm_id: uuid.UUID) -> None:
    with Visitor(sp, vm_id) as first, Visitor(sp, vm_id) as impatient, Visitor(sp, vm_id) as patient:
        assert first.gets_it()
        impatient.socket.close()
        first.socket.close()
        assert patient.gets_it()


def test_the_hypervisor_sees_whether_a_process_holds_the_interface(sp: RunningSp, vm_id: uuid.UUID) -> None:
    assert not is_connected(sp, vm_id)
    with Visitor(sp, vm_id) as visitor:
        assert visitor.gets_it()
        assert is_connected(sp, vm_id)
        visitor.socket.shutdown(socket.SHUT_WR)
        assert visitor.is_turned_away(), "the SP closes its end too"
    assert not is_connected(sp, vm_id)


@pytest.mark.attack("A10")
def test_holders_of_different_interfaces_do_not_wait_for_each_other(sp: RunningSp, vm_id: uuid.UUID) -> None:
    other = sp.launch()
    with (
        Visitor(sp, vm_id) as one,
        Visitor(sp, other) as two,
        one.offer() as offer_one,
        two.offer() as offer_two,
    ):
        inodes = {os.fstat(descriptor).st_ino for descriptor in (offer_one.memory, offer_two.memory)}
        assert len(inodes) == 2
    sp.destroy(other)


# What is offered


@pytest.mark.attack("A12")
def test_memory_that_is_not_sealed_can_be_cut_short_and_kills_whoever_reads_it() -> None:
    reader = f"""
import mmap, os
memory = os.memfd_create("plain")
os.ftruncate(memory, {crb.MEMORY_BYTES})
mapped = mmap.mmap(memory, {crb.MEMORY_BYTES})
os.ftruncate(memory, 0)
mapped[0]
"""
    assert subprocess.run([sys.executable, "-c", reader]).returncode == -7  # SIGBUS


@pytest.mark.attack("A12")
def test_the_offered_memory_can_neither_be_cut_short_nor_grown_nor_its_seals_changed(
    sp: RunningSp, vm_id: uuid.UUID
) -> None:
    with Visitor(sp, vm_id) as visitor, visitor.offer() as offer:
        seals = fcntl.fcntl(offer.memory, fcntl.F_GET_SEALS)
        wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        assert seals & wanted == wanted
        for size in (0, 1, crb.MEMORY_BYTES - 1, crb.MEMORY_BYTES + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(offer.memory, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(offer.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))


def test_the_next_holder_gets_the_same_memory_and_a_new_power_on_gives_new_memory(
    sp: RunningSp, vm_id: uuid.UUID
) -> None:
    def inode() -> int:
        with Visitor(sp, vm_id) as visitor, visitor.offer() as offer:
            return os.fstat(offer.memory).st_ino

    first = inode()
    assert inode() == first
    sp.call(messages.ParkVtpm(vm_id=vm_id))
    assert inode() == first
    sp.call(messages.ResetVm(vm_id=vm_id))
    assert inode() == first, "a VM that is reset keeps its interface"
    sp.call(messages.StopVm(vm_id=vm_id))
    sp.call(messages.StartVm(vm_id=vm_id))
    assert inode() != first


# Its life


@pytest.mark.attack("A27")
def test_the_socket_is_the_owners_alone(sp: RunningSp, vm_id: uuid.UUID) -> None:
    assert sp.interface(vm_id).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "end",
    [
        lambda sp, vm_id: sp.call(messages.StopVm(vm_id=vm_id)),
        lambda sp, vm_id: sp.call(messages.HibernateVm(vm_id=vm_id)),
        RunningSp.destroy,
    ],
    ids=["StopVm", "HibernateVm", "the owner's DestroyVm"],
)
def test_the_end_of_the_vtpm_ends_the_connection_of_its_holder_and_of_those_who_wait(
    sp: RunningSp, end: Callable[[RunningSp, uuid.UUID], object]
) -> None:
    vm_id = sp.launch()
    with Visitor(sp, vm_id) as holder, Visitor(sp, vm_id) as patient:
        assert holder.gets_it()
        end(sp, vm_id)
        assert holder.is_turned_away()
        assert patient.is_turned_away()
        assert not sp.interface(vm_id).exists()


def test_a_socket_that_a_killed_daemon_left_behind_is_replaced(state_directory: Path) -> None:
    with RunningSp(state_directory) as running:
        vm_id = running.launch()
        running.kill()
        assert running.interface(vm_id).is_socket()
        with pytest.raises(InterfaceError, match="cannot connect"):
            InterfaceMemory.connect(running.interface(vm_id))
        running.start()
        running.call(messages.StartVm(vm_id=vm_id))
        with running.driver(vm_id) as driver:
            tpm.checked(driver.transmit(tpm.startup()))


@pytest.mark.attack("A23")
def test_interfaces_come_and_go_without_a_trace(sp: RunningSp) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{sp.process.pid}/fd"))  # noqa: PTH208

    counts = []
    for _ in range(6):
        vm_id = sp.new_vm()
        sp.call(messages.LaunchVm(vm_id=vm_id, with_vtpm=False))
        without = descriptors()
        sp.call(messages.CreateVtpm(vm_id=vm_id))
        for end in (messages.StopVm, messages.HibernateVm, messages.StopVm):
            with sp.driver(vm_id) as driver:
                driver.transmit(tpm.startup())
            sp.call(end(vm_id=vm_id))
            sp.call(messages.StartVm(vm_id=vm_id))
        sp.destroy(vm_id)
        counts.append(descriptors() - without)
    assert sum(counts[1:]) <= 4, f"spare workers may come and go, interfaces must not stay: {counts}"


def test_a_path_that_is_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("x" * MAX_SOCKET_PATH_BYTES)
    with pytest.raises(ResourceError, match=f"longer than {MAX_SOCKET_PATH_BYTES} bytes"):
        listen(path, frozenset(), 1)


def test_a_place_where_nothing_can_listen_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "socket", tmp_path):
        with pytest.raises(ResourceError, match="cannot listen on"):
            listen(path, frozenset(), 1)
