"""A12: registers altered while a command runs; huge sizes, addresses outside the memory, double fetch, memory cut short."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.wire import crb
from spvtpm.wire.crb import AttachError, Register
from spvtpm.wire.errors import SpvtpmError
from tests import tpm_commands as tpm
from tests.attacks import memory_owner
from tests.harness import RunningSp

MEASUREMENT = bytes(range(32))


@contextmanager
def attached(sp: RunningSp) -> Iterator[tuple[InterfaceMemory, CrbDriver]]:
    vm_id = sp.launch()
    with InterfaceMemory.connect(sp.interface(vm_id)) as interface:
        driver = CrbDriver(interface, sp.key(vm_id))
        tpm.checked(driver.transmit(tpm.startup()))
        yield interface, driver


@pytest.mark.attack("A12")
def test_a_slice_without_bounds_would_read_what_the_attacker_points_at() -> None:
    memory = bytearray(crb.MEMORY_BYTES)
    address = crb.MEMORY_BYTES - 4
    assert len(memory[address : address + 4096]) == 4, "Python cuts silently: without a check the copy is short"


@pytest.mark.attack("A12")
@pytest.mark.claim("C9")
@pytest.mark.parametrize(
    ("register", "value"),
    [
        (Register.CTRL_CMD_LADDR, 0),
        (Register.CTRL_CMD_LADDR, crb.ATTACH_OFFSET),
        (Register.CTRL_CMD_LADDR, crb.MEMORY_BYTES - 1),
        (Register.CTRL_CMD_LADDR, 0xFFFFFFFF),
        (Register.CTRL_CMD_HADDR, 1),
        (Register.CTRL_CMD_HADDR, 0xFFFFFFFF),
        (Register.CTRL_CMD_SIZE, 0),
        (Register.CTRL_RSP_ADDR, 0),
        (Register.CTRL_RSP_ADDR, crb.ATTACH_OFFSET),
        (Register.CTRL_RSP_ADDR, crb.MEMORY_BYTES),
        (Register.CTRL_RSP_SIZE, 0),
    ],
)
def test_an_address_or_size_outside_the_memory_is_an_error_and_nothing_is_executed(
    sp: RunningSp, register: Register, value: int
) -> None:
    with attached(sp) as (interface, driver):
        saved = crb.U32.unpack_from(interface.memory, register)[0]
        frame = driver._session.seal(1, driver._sequence + 1, crb.COMMAND_ADDRESS, tpm.pcr_extend(16, MEASUREMENT))  # type: ignore[arg-type]
        memory_owner.put(interface, crb.COMMAND_ADDRESS, frame)
        memory_owner.write(interface, register, value)

        assert memory_owner.start_command(interface) is AttachError.BAD_ADDRESS

        memory_owner.write(interface, register, saved)
        assert tpm.pcr_in(driver.transmit(tpm.pcr_read(16))) == bytes(32)


@pytest.mark.attack("A12")
@pytest.mark.claim("C9")
def test_a_response_buffer_too_small_is_an_error_and_nothing_is_written_beyond_it(sp: RunningSp) -> None:
    with attached(sp) as (interface, driver):
        memory_owner.write(interface, Register.CTRL_RSP_SIZE, 90)
        canary = os.urandom(256)
        memory_owner.put(interface, crb.RESPONSE_ADDRESS, canary)
        with pytest.raises(SpvtpmError, match="does not fit"):
            driver.transmit(tpm.get_random(32))

        assert interface.memory[crb.RESPONSE_ADDRESS : crb.RESPONSE_ADDRESS + 256] == canary


@pytest.mark.attack("A12")
def test_the_shared_memory_cannot_be_cut_short_under_the_worker(sp: RunningSp) -> None:
    with attached(sp) as (interface, driver):
        with pytest.raises(PermissionError):
            os.ftruncate(interface.descriptors.memory, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(interface.descriptors.memory, 1 << 20)
        tpm.checked(driver.transmit(tpm.get_random(8)))


@pytest.mark.attack("A12")
@pytest.mark.claim("C9")
def test_memory_that_changes_all_the_time_never_executes_what_was_not_sent(sp: RunningSp) -> None:
    """Double fetch: another thread flips frame, registers and sizes while commands run; only PCR reads are ever sent."""
    with attached(sp) as (interface, driver):
        stop = threading.Event()

        def scribble() -> None:
            places = [Register.CTRL_CMD_LADDR, Register.CTRL_CMD_SIZE, Register.CTRL_RSP_ADDR, crb.COMMAND_ADDRESS + 8]
            while not stop.is_set():
                for place in places:
                    old = crb.U32.unpack_from(interface.memory, place)[0]
                    crb.U32.pack_into(interface.memory, place, old ^ 0x40)
                    crb.U32.pack_into(interface.memory, place, old)

        thread = threading.Thread(target=scribble)
        thread.start()
        outcomes = set()
        for _ in range(300):
            try:
                outcomes.add(tpm.pcr_in(driver.transmit(tpm.pcr_read(16), timeout_s=5)))
            except SpvtpmError as error:
                outcomes.add(type(error).__name__.encode())
        stop.set()
        thread.join()
        restore = ((Register.CTRL_CMD_LADDR, crb.COMMAND_ADDRESS), (Register.CTRL_CMD_SIZE, crb.COMMAND_BYTES))
        for register, value in (*restore, (Register.CTRL_RSP_ADDR, crb.RESPONSE_ADDRESS)):
            memory_owner.write(interface, register, value)

        assert outcomes <= {bytes(32), b"InterfaceError", b"MailboxError"}
        assert tpm.pcr_in(driver.transmit(tpm.pcr_read(16))) == bytes(32)


@pytest.fixture(scope="module")
def shared_sp() -> Iterator[RunningSp]:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory, RunningSp(Path(directory) / "sp") as running:
        yield running


@pytest.mark.attack("A12")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(page=st.binary(min_size=0x70, max_size=0x70), frame=st.binary(max_size=512))
def test_any_register_page_and_any_frame_leave_the_worker_alive_and_the_neighbour_undisturbed(
    fuzzed: tuple[InterfaceMemory, CrbDriver, CrbDriver], page: bytes, frame: bytes
) -> None:
    interface, driver, neighbour = fuzzed
    memory_owner.put(interface, 0, page)
    memory_owner.put(interface, crb.COMMAND_ADDRESS, frame)
    interface.ring()
    tpm.checked(neighbour.transmit(tpm.get_random(8)))

    restored = crb.Registers(
        0, 1, 0, crb.INTF_ID_LOW, 0, 0, 0, 0, 0, 0, 0, 0, 0x2000, crb.COMMAND_ADDRESS, 0, 0x2000, crb.RESPONSE_ADDRESS
    )
    crb.REGISTERS.pack_into(interface.memory, 0, *restored)
    assert tpm.pcr_in(driver.transmit(tpm.pcr_read(16))) == bytes(32)


@pytest.fixture(scope="module")
def fuzzed(shared_sp: RunningSp) -> Iterator[tuple[InterfaceMemory, CrbDriver, CrbDriver]]:
    with attached(shared_sp) as (interface, driver), attached(shared_sp) as (_other, neighbour):
        yield interface, driver, neighbour
