"""The TPM emulator interface, with a client that does as QEMU does, or worse."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.engine.libtpms import Engine
from spvtpm.wire import messages
from spvtpm.wire.errors import DirectPathOnly, WrongState
from spvtpm.wire.owner_messages import Events, ReadEvents
from spvtpm.wire.swtpm_control import MAX_BUFFER_BYTES, MIN_BUFFER_BYTES
from tests import emulator_client as swtpm
from tests import tpm_commands as tpm
from tests.emulator_client import EmulatorClient
from tests.harness import RunningSp
from tests.owner import ANYTHING
from tests.throwaway import run_in_child

pytestmark = pytest.mark.claim("B1")

_CAPABILITIES = 0x3CAF
"""INIT, SHUTDOWN, GET_EST, SET_LOC; CANCEL, RESET_EST; STOP, GET_CONFIG; SET_DATAFD, SET_BUFSZ."""

_FAILURE = bytes.fromhex("80010000000a00000101")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSp]:
    with RunningSp(tmp_path_factory.mktemp("sp") / "sp") as running:
        yield running


@pytest.fixture
def vm(shared: RunningSp) -> Iterator[tuple[uuid.UUID, Path]]:
    """A VM of the test's own, booted on the TPM emulator interface."""
    vm_id, path = shared.launch_emulated()
    yield vm_id, path
    shared.destroy(vm_id)


@pytest.fixture
def client(vm: tuple[uuid.UUID, Path]) -> Iterator[EmulatorClient]:
    """A client whose TPM is on and started."""
    with EmulatorClient(vm[1]) as attached:
        attached.attach()
        tpm.checked(attached.transmit(tpm.startup()))
        yield attached


def pcr_is_touched(client: EmulatorClient) -> bool:
    return tpm.pcr_in(client.transmit(tpm.pcr_read(16))) != bytes(32)


def touch_pcr(client: EmulatorClient) -> None:
    tpm.checked(client.transmit(tpm.pcr_extend(16, b"m" * 32)))


# The conversation


def test_qemus_conversation_is_answered_byte_for_byte(vm: tuple[uuid.UUID, Path]) -> None:
    """As QEMU 7.2 with tpm-crb was heard to speak with swtpm 0.7; only the capabilities are ours."""
    reset = [
        ("0000000e", "00000000"),
        ("0000001100000000", "00000000 00001000 00000af8 00001000"),
        ("0000000e", "00000000"),
        ("0000001100000f80", "00000000 00000f80 00000af8 00001000"),
        ("0000000200000000", "00000000"),
    ]
    with EmulatorClient(vm[1]) as client:

        def heard(conversation: list[tuple[str, str]]) -> None:
            for said, answered in conversation:
                assert client.ask(bytes.fromhex(said)) == bytes.fromhex(answered), said

        assert client.do(swtpm.CMD_SET_DATAFD, b"", client._theirs.fileno()) == 0
        assert client.transmit(bytes.fromhex("80010000000a00000181")) == _FAILURE
        heard([("00000001", f"00000000 {_CAPABILITIES:08x}")])
        heard(reset)
        heard([("00000004", "00000000 00000000"), ("0000000500000000", "00000000")])
        tpm.checked(client.transmit(tpm.startup()))
        heard([("0000000e", "00000000"), ("0000001100000000", "00000000 00000f80 00000af8 00001000"), *reset[2:]])
        assert tpm.response_code(client.transmit(tpm.get_random(8))) == tpm.RC_INITIALIZE
        heard([("00000003", "00000000")])


def test_the_limits_of_buffers_are_those_of_libtpms() -> None:
    def limits() -> tuple[int, int]:
        with Engine(lambda _permanent: None) as engine:
            return engine.buffer_size.smallest, engine.buffer_size.largest

    assert run_in_child(limits) == (MIN_BUFFER_BYTES, MAX_BUFFER_BYTES)


def test_the_tpm_tells_its_guest_the_size_of_buffers_that_qemu_has(client: EmulatorClient) -> None:
    assert client.do(swtpm.CMD_STOP) == 0
    client.ask(struct.pack(">II", swtpm.CMD_SET_BUFFERSIZE, 3968))
    assert client.init() == 0
    tpm.checked(client.transmit(tpm.startup()))
    told = client.transmit(tpm.get_capability(tpm.CAP_TPM_PROPERTIES, tpm.PT_MAX_COMMAND_SIZE))
    assert tpm.property_in(told) == 3968


@pytest.mark.parametrize(("wanted", "got"), [(1, 2808), (2808, 2808), (0xFFFFFFFF, 4096)])
def test_a_size_of_buffers_beyond_the_limits_is_brought_within(client: EmulatorClient, wanted: int, got: int) -> None:
    refused = client.ask(struct.pack(">II", swtpm.CMD_SET_BUFFERSIZE, wanted))
    assert struct.unpack(">IIII", refused) == (swtpm.TPM_BAD_ORDINAL, 4096, 2808, 4096), "the TPM is on"
    client.do(swtpm.CMD_STOP)
    answer = client.ask(struct.pack(">II", swtpm.CMD_SET_BUFFERSIZE, wanted))
    assert struct.unpack(">IIII", answer) == (0, got, 2808, 4096)


@pytest.mark.attack("A14")
def test_there_is_no_locality_but_0_and_nothing_to_measure_from(client: EmulatorClient) -> None:
    for locality in range(1, 256):
        assert client.do(swtpm.CMD_SET_LOCALITY, bytes([locality, 0, 0, 0])) == swtpm.TPM_BAD_LOCALITY
    assert client.do(swtpm.CMD_SET_LOCALITY, b"\0") == 0, "tpm2-tss sends one byte"
    assert client.do(swtpm.CMD_HASH_START) == swtpm.TPM_BAD_ORDINAL
    assert client.do(swtpm.CMD_RESET_TPMESTABLISHED, bytes(4)) == swtpm.TPM_BAD_LOCALITY
    assert tpm.base_code(client.transmit(tpm.pcr_reset(20))) == tpm.RC_LOCALITY


def test_requests_that_it_does_not_have_are_refused(client: EmulatorClient) -> None:
    for code, body in (
        (swtpm.CMD_STORE_VOLATILE, b""),
        (swtpm.CMD_GET_INFO, bytes(16)),
        (0x14, b""),
        (0xFFFFFFFF, b"x"),
    ):
        assert client.do(code, body) == swtpm.TPM_BAD_ORDINAL
    assert client.ask(struct.pack(">I", swtpm.CMD_GET_CONFIG)) == struct.pack(">II", 0, 1)
    tpm.checked(client.transmit(tpm.get_random(8)))


# Power


def test_commands_fail_unless_the_tpm_is_on(vm: tuple[uuid.UUID, Path]) -> None:
    with EmulatorClient(vm[1]) as client:
        assert client.init() == swtpm.TPM_BAD_ORDINAL, "there is no data channel"
        client.attach()
        tpm.checked(client.transmit(tpm.startup()))
        client.do(swtpm.CMD_STOP)
        assert client.transmit(tpm.get_random(8)) == _FAILURE
        assert client.do(swtpm.CMD_CANCEL_TPM_CMD) == swtpm.TPM_BAD_ORDINAL
        assert struct.unpack(">IB3x", client.ask(struct.pack(">I", swtpm.CMD_GET_TPMESTABLISHED)))[0] == 10
        assert client.init() == 0
        tpm.checked(client.transmit(tpm.startup()))


def test_init_is_a_reset_and_what_is_permanent_stays(client: EmulatorClient) -> None:
    tpm.checked(client.transmit(tpm.nv_define(0x1500001, 4)))
    tpm.checked(client.transmit(tpm.nv_write(0x1500001, b"kept")))
    touch_pcr(client)
    before = tpm.clock_in(client.transmit(tpm.read_clock()))

    assert client.init() == 0
    tpm.checked(client.transmit(tpm.startup()))
    after = tpm.clock_in(client.transmit(tpm.read_clock()))
    assert not pcr_is_touched(client)
    assert tpm.nv_content_in(client.transmit(tpm.nv_read(0x1500001, 4))) == b"kept"
    assert after.reset_count == before.reset_count + 1
    assert after.is_safe, "it was shut down in order"


@pytest.mark.parametrize("parks", [False, True])
def test_a_guest_that_slept_comes_back_with_its_pcrs(
    shared: RunningSp, vm: tuple[uuid.UUID, Path], client: EmulatorClient, parks: bool
) -> None:
    touch_pcr(client)
    tpm.checked(client.transmit(tpm.pcr_extend(0, b"m" * 32)))
    before = tpm.pcr_in(client.transmit(tpm.pcr_read(0)))
    tpm.checked(client.transmit(tpm.shutdown(clear=False)))
    if parks:
        shared.info(messages.ParkVtpm(vm_id=vm[0]))
    client.do(swtpm.CMD_STOP)
    assert client.init() == 0
    tpm.checked(client.transmit(tpm.startup(clear=False)))
    assert tpm.pcr_in(client.transmit(tpm.pcr_read(0))) == before


def test_a_client_that_comes_after_another_finds_a_tpm_that_was_reset(
    vm: tuple[uuid.UUID, Path], client: EmulatorClient
) -> None:
    touch_pcr(client)
    client.close()
    with EmulatorClient(vm[1]) as next_client:
        next_client.attach()
        assert tpm.response_code(next_client.transmit(tpm.get_random(8))) == tpm.RC_INITIALIZE
        tpm.checked(next_client.transmit(tpm.startup()))
        assert not pcr_is_touched(next_client)


def test_one_client_at_a_time(shared: RunningSp, vm: tuple[uuid.UUID, Path], client: EmulatorClient) -> None:
    with EmulatorClient(vm[1]) as second:
        assert second.ask(struct.pack(">I", swtpm.CMD_GET_CAPABILITY)) == b""
    tpm.checked(client.transmit(tpm.get_random(8)))
    assert "another process holds it" in shared.log()


def test_a_parked_vtpm_wakes_for_a_command(
    shared: RunningSp, vm: tuple[uuid.UUID, Path], client: EmulatorClient
) -> None:
    touch_pcr(client)
    for _ in range(3):
        parked = shared.info(messages.ParkVtpm(vm_id=vm[0])).vtpm
        assert parked is not None and parked.residency == "parked"
        assert pcr_is_touched(client)
    shared.info(messages.ParkVtpm(vm_id=vm[0]))
    assert client.init() == 0
    tpm.checked(client.transmit(tpm.startup()))
    assert not pcr_is_touched(client)


def test_a_parked_vtpm_whose_client_goes_is_off(
    shared: RunningSp, vm: tuple[uuid.UUID, Path], client: EmulatorClient
) -> None:
    shared.info(messages.ParkVtpm(vm_id=vm[0]))
    client.close()
    with EmulatorClient(vm[1]) as next_client:
        next_client.attach()
        assert tpm.response_code(next_client.transmit(tpm.get_random(8))) == tpm.RC_INITIALIZE


def test_the_vm_that_is_reset_or_stopped_has_its_tpm_off(
    shared: RunningSp, vm: tuple[uuid.UUID, Path], client: EmulatorClient
) -> None:
    shared.info(messages.ResetVm(vm_id=vm[0]))
    assert client.transmit(tpm.get_random(8)) == _FAILURE
    assert client.init() == 0
    tpm.checked(client.transmit(tpm.startup()))

    shared.info(messages.StopVm(vm_id=vm[0]))
    assert client.data.recv(1) == client.control.recv(1) == b""
    assert not vm[1].exists()
    assert shared.info(messages.StartVm(vm_id=vm[0])).vtpm is not None
    with shared.driver(vm[0]) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
    assert not vm[1].exists(), "this boot is on the direct path"


def test_a_running_key_generation_is_cancelled(client: EmulatorClient) -> None:
    for number in range(30):  # one that is done too soon tells nothing
        client.data.sendall(tpm.create_primary(tpm.rsa2048(unique=bytes([number]) * 256)))
        assert client.do(swtpm.CMD_CANCEL_TPM_CMD) == 0
        response = client.data.recv(4096)
        if tpm.response_code(response) == tpm.RC_CANCELED:
            break
        tpm.checked(client.transmit(tpm.flush_context(tpm.handle_in(tpm.checked(response)))))
    else:
        pytest.fail("no key generation was ever cancelled")
    tpm.checked(client.transmit(tpm.create_primary(tpm.ecc_p256())))


def test_stop_waits_for_the_command_under_way_and_its_answer_comes(client: EmulatorClient) -> None:
    client.data.sendall(tpm.create_primary(tpm.rsa2048(unique=b"k" * 256)))
    assert client.do(swtpm.CMD_STOP) == 0
    assert len(client.data.recv(4096)) >= 10


def test_a_vtpm_that_dies_answers_with_failure_until_its_vm_boots_anew(
    shared: RunningSp, vm: tuple[uuid.UUID, Path], client: EmulatorClient
) -> None:
    os.kill(_worker_that_reads(shared, client), signal.SIGKILL)
    deadline = time.monotonic() + swtpm.PATIENCE_S
    while shared.vm(vm[0]).state != "failed":
        assert time.monotonic() < deadline
    assert client.transmit(tpm.get_random(8)) == _FAILURE
    assert client.init() == swtpm.TPM_FAIL, "a new start would reset PCRs under a guest that still runs"

    shared.info(messages.ResetVm(vm_id=vm[0]))
    assert client.init() == 0
    tpm.checked(client.transmit(tpm.startup()))


def _worker_that_reads(sp: RunningSp, client: EmulatorClient) -> int:
    """The one that works when the client has something to do."""
    before = {pid: _ticks(pid) for pid in sp.workers()}
    for number in range(4):
        response = tpm.checked(client.transmit(tpm.create_primary(tpm.rsa2048(unique=bytes([number]) * 256))))
        tpm.checked(client.transmit(tpm.flush_context(tpm.handle_in(response))))
    return max(before, key=lambda pid: _ticks(pid) - before[pid])


def _ticks(pid: int) -> int:
    """Source: proc_pid_stat(5), field 14, after the name in parentheses."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


# What the guest, or whoever speaks for it, may do wrong


@pytest.mark.parametrize(
    "command", [b"\x80", b"\x80\x01\0\0\0\x05", tpm.get_random(8)[:-1], b"\xff" * 3968, b"\0" * 4097]
)
def test_what_is_no_command_is_answered_and_the_next_one_served(client: EmulatorClient, command: bytes) -> None:
    """QEMU waits for the answer to whatever its guest has written, and could not even reset its machine."""
    assert tpm.response_code(client.transmit(command)) != tpm.RC_SUCCESS
    tpm.checked(client.transmit(tpm.get_random(8)))


def test_only_one_connected_stream_socket_is_a_data_channel(vm: tuple[uuid.UUID, Path]) -> None:
    reading, writing = os.pipe()
    lonely, listening = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    packets = socket.socketpair(type=socket.SOCK_SEQPACKET)
    file = os.memfd_create("file")
    with EmulatorClient(vm[1]) as client, lonely, listening, packets[0], packets[1], socket.socket() as inet:
        own = client._theirs.fileno()
        wrong = (reading, writing, lonely.fileno(), listening.fileno(), packets[0].fileno(), file, inet.fileno())
        for descriptors in ((), (own, own), (own,) * 6, *((descriptor,) for descriptor in wrong)):
            assert client.do(swtpm.CMD_SET_DATAFD, b"", *descriptors) == swtpm.TPM_BAD_PARAMETER, descriptors
        client.attach()
        assert client.do(swtpm.CMD_SET_DATAFD, b"", packets[0].fileno()) == swtpm.TPM_BAD_ORDINAL
        tpm.checked(client.transmit(tpm.startup()))
    for descriptor in (reading, writing, file):
        os.close(descriptor)


@pytest.mark.parametrize("request_", [b"\0\0\0", b"\0\0\0\x02\0", b"\0\0\0\x01x", b"\0\0\0\x02" + bytes(5)])
def test_a_request_that_is_cut_off_or_too_long_is_refused_and_ends_the_connection(
    vm: tuple[uuid.UUID, Path], request_: bytes
) -> None:
    with EmulatorClient(vm[1]) as client:
        assert client.ask(request_) == struct.pack(">I", swtpm.TPM_BAD_PARAMETER)
        assert client.control.recv(1) == b""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.binary(max_size=80)
        | st.builds(lambda code, body: struct.pack(">I", code) + body, st.integers(0, 0x15), st.binary(max_size=20)),
        max_size=6,
    )
)
def test_whatever_one_client_says_the_next_one_is_served(vm: tuple[uuid.UUID, Path], requests: list[bytes]) -> None:
    with EmulatorClient(vm[1]) as hostile:
        for request in requests:
            hostile.control.setblocking(False)
            try:
                socket.send_fds(hostile.control, [request or b"\0"], [hostile._theirs.fileno()])
            except OSError:
                break
    with EmulatorClient(vm[1]) as client:
        client.attach()
        tpm.checked(client.transmit(tpm.startup()))


# What its owner says


def test_an_owner_who_does_not_allow_it_is_told_that_the_host_wanted_it(shared: RunningSp) -> None:
    vm_id = shared.new_vm(msgspec.structs.replace(ANYTHING, direct_path_only=True))
    for _ in range(3):
        with pytest.raises(DirectPathOnly, match="does not allow"):
            shared.info(messages.LaunchVm(vm_id=vm_id, emulated=True))
    shared.info(messages.LaunchVm(vm_id=vm_id))
    shared.info(messages.StopVm(vm_id=vm_id))
    with pytest.raises(DirectPathOnly):
        shared.info(messages.StartVm(vm_id=vm_id, emulated=True))
    assert [path.name for path in (shared.state / "run").glob(f"{vm_id}*")] == []
    with shared.channel() as channel:
        words = [event.what for event in channel.ask(ReadEvents(vm_id=vm_id), Events).events]
    assert words == ["provisioned", "emulator-refused", "launched", "stopped"]


def test_the_owner_sees_which_boots_were_on_it(shared: RunningSp, vm: tuple[uuid.UUID, Path]) -> None:
    with shared.channel() as channel:
        (boot,) = (event for event in channel.ask(ReadEvents(vm_id=vm[0]), Events).events if event.what == "launched")
    assert boot.detail == "boot 1, by the TPM emulator interface"


def test_a_boot_has_one_interface(shared: RunningSp, vm: tuple[uuid.UUID, Path]) -> None:
    assert [path.name for path in (shared.state / "run").glob(f"{vm[0]}*")] == [f"{vm[0]}.emulator.sock"]
    assert vm[1].stat().st_mode & 0o777 == 0o600


def test_its_vtpm_is_neither_hibernated_nor_handed_over(shared: RunningSp, vm: tuple[uuid.UUID, Path]) -> None:
    for request in (messages.HibernateVm(vm_id=vm[0]), messages.SendStart(vm_id=vm[0])):
        with pytest.raises(WrongState, match="TPM emulator interface"):
            shared.call(request)


def test_a_vm_that_was_hibernated_goes_on_by_the_direct_path_alone(shared: RunningSp) -> None:
    vm_id = shared.launch()
    shared.info(messages.HibernateVm(vm_id=vm_id))
    with pytest.raises(WrongState, match="direct path"):
        shared.info(messages.StartVm(vm_id=vm_id, emulated=True))
    assert shared.info(messages.StartVm(vm_id=vm_id)).state == "running"
