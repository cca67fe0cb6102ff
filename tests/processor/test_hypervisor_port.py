"""The hypervisor's socket against a hypervisor that breaks every rule: a typed error or the end, and the others go on."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.processor.hypervisor_port import MAX_CONNECTIONS
from spvtpm.wire import messages
from spvtpm.wire.errors import ResourceError, SpvtpmError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.messages import MAX_REQUEST_BYTES, VERSION, ErrorReply, Reply, Status, encode_message, parse_reply
from tests.harness import RunningSp

pytestmark = pytest.mark.attack("A25")

STATUS = encode_message(messages.GetStatus())
VM = "6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11"


@pytest.fixture(scope="module")
def sp() -> Iterator[RunningSp]:
    """A running SP for all tests of this module."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path, RunningSp(Path(path) / "sp") as running:
        yield running


class Rude:
    """A connection on which anything can be said."""

    def __init__(self, sp: RunningSp) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(sp.socket))
        self.socket.settimeout(60)
        self._decoder = FrameDecoder()
        self._replies: list[Reply] = []

    def say(self, data: bytes) -> None:
        self.socket.sendall(data)

    def hear(self) -> Reply | None:
        """The next answer; None once the SP has closed the connection."""
        while not self._replies:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._replies += [parse_reply(frame) for frame in self._decoder.feed(data)]
        return self._replies.pop(0)

    def ask(self, payload: bytes) -> Reply | None:
        self.say(encode_frame(payload))
        return self.hear()

    def finish(self) -> list[Reply]:
        """Says no more; everything that the SP still answers, until it closes."""
        self.socket.shutdown(socket.SHUT_WR)
        answers: list[Reply] = []
        while (reply := self.hear()) is not None:
            answers.append(reply)
        return answers

    def __enter__(self) -> Rude:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.socket.close()


@pytest.fixture(autouse=True)
def others_go_on(sp: RunningSp) -> Iterator[None]:
    """A polite hypervisor that was connected before the test, and the daemon itself, never notice."""
    with SecureProcessorClient(sp.socket) as polite:
        before = polite.call(messages.GetStatus())
        yield
        assert polite.call(messages.GetStatus()) == before
    assert sp.process.poll() is None
    assert "met a defect" not in sp.log()


def refusal(reply: Reply | None) -> str:
    assert isinstance(reply, ErrorReply), reply
    return reply.code


# Messages


def raw(content: object) -> bytes:
    """A message of this version that says anything."""
    return bytes([VERSION]) + msgspec.msgpack.encode(content)


def message(kind: str, **fields: object) -> bytes:
    return raw({"type": kind, **fields})


@pytest.mark.parametrize(
    "payload",
    [
        message("DestroyEverything"),
        message("Status"),
        message("ErrorReply", code="x", message="y"),
        message("StopVm"),
        message("StopVm", vm_id=7),
        message("StopVm", vm_id=None),
        message("StopVm", vm_id="not a uuid"),
        message("StopVm", vm_id=VM + "0"),
        message("StopVm", vm_id=VM, force=True),
        message("LaunchVm", vm_id=VM, with_vtpm=1),
        message("LaunchVm", vm_id=VM, with_vtpm="yes"),
        message(""),
        raw({}),
        raw(["GetStatus", 1]),
        raw("GetStatus"),
        raw(None),
        STATUS[:1],
        STATUS[1:],
        STATUS + b"\0",
        STATUS[:-1],
        bytes([VERSION]) + b"\xc1",
        bytes([VERSION]) + b"\x91" * (MAX_REQUEST_BYTES - 1),
        bytes([VERSION]) + b"\x81\xa4type" * 600,
        bytes([VERSION]) + b"\xdd\xff\xff\xff\xff",
        bytes([VERSION]) + b"\xc6\xff\xff\xff\xff",
    ],
)
def test_what_is_no_request_gets_a_typed_error_and_the_connection_goes_on(sp: RunningSp, payload: bytes) -> None:
    with Rude(sp) as rude:
        assert refusal(rude.ask(payload)) == "bad-message"
        assert isinstance(rude.ask(STATUS), Status)


@pytest.mark.attack("A26")
@pytest.mark.parametrize("version", [0, VERSION + 1, 0x7F, 0x80, 0xFF])
def test_another_version_of_the_protocol_is_refused(sp: RunningSp, version: int) -> None:
    with Rude(sp) as rude:
        assert refusal(rude.ask(bytes([version]) + STATUS[1:])) == "bad-message"


values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.just(VM),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=10) | st.sampled_from(["type", "with_vtpm", "vm_id"]), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.lists(values, min_size=1, max_size=5))
def test_any_structure_that_is_no_request_is_answered_in_turn(sp: RunningSp, structures: list[object]) -> None:
    with Rude(sp) as rude:
        for structure in structures:
            rude.say(encode_frame(raw(structure)))
        rude.say(encode_frame(STATUS))
        answers = rude.finish()
    assert [refusal(answer) for answer in answers[:-1]] == ["bad-message"] * len(structures)
    assert isinstance(answers[-1], Status)


fields = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["StopVm", "StartVm", "ResetVm", "ParkVtpm", "WakeVtpm", "HibernateVm", "CreateVtpm", "GetEndorsement"]
        )
    },
    optional={
        "vm_id": st.sampled_from([VM, VM.upper(), VM[:-1], 5]),
        "more": st.none(),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(fields)
def test_a_request_that_is_almost_right_is_refused_for_what_is_wrong_with_it(
    sp: RunningSp, request_fields: dict[str, object]
) -> None:
    right = "more" not in request_fields and request_fields.get("vm_id") in (VM, VM.upper())
    with Rude(sp) as rude:
        code = refusal(rude.ask(raw(request_fields)))
    assert code == ("not-found" if right else "bad-message")


# Frames


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.binary(max_size=3 * MAX_REQUEST_BYTES))
def test_arbitrary_bytes_end_in_typed_errors_or_silence(sp: RunningSp, data: bytes) -> None:
    with Rude(sp) as rude:
        rude.say(struct.pack(">I", 0xFFFFFFFF) + data)
        answers = rude.finish()
    assert [refusal(answer) for answer in answers] == ["bad-frame"]


@pytest.mark.parametrize("length", [0, MAX_REQUEST_BYTES + 1, 1 << 20, (1 << 32) - 1])
def test_a_frame_that_announces_nothing_or_too_much_ends_its_connection_with_the_reason(
    sp: RunningSp, length: int
) -> None:
    with Rude(sp) as rude:
        assert isinstance(rude.ask(STATUS), Status)
        rude.say(struct.pack(">I", length))
        assert refusal(rude.hear()) == "bad-frame"
        assert rude.hear() is None


def test_the_longest_frame_is_read(sp: RunningSp) -> None:
    padding = "x" * (MAX_REQUEST_BYTES - len(message("GetStatus", y="")) - 2)
    payload = message("GetStatus", y=padding)
    assert len(payload) == MAX_REQUEST_BYTES
    with Rude(sp) as rude:
        assert refusal(rude.ask(payload)) == "bad-message"
        assert isinstance(rude.ask(STATUS), Status)


def test_a_request_that_arrives_byte_by_byte_is_answered(sp: RunningSp) -> None:
    with Rude(sp) as rude:
        for byte in encode_frame(STATUS):
            rude.say(bytes([byte]))
        assert isinstance(rude.hear(), Status)


def test_requests_that_arrive_at_once_are_answered_in_order(sp: RunningSp) -> None:
    with Rude(sp) as rude:
        rude.say(encode_frame(STATUS) + encode_frame(message("StopVm", vm_id=VM)) + encode_frame(STATUS))
        first, second, third = rude.finish()
    assert isinstance(first, Status)
    assert refusal(second) == "not-found"
    assert isinstance(third, Status)


@pytest.mark.parametrize("size", range(0, len(encode_frame(STATUS)), 5))
def test_half_a_frame_and_then_the_end_is_no_request(sp: RunningSp, size: int) -> None:
    with Rude(sp) as rude:
        rude.say(encode_frame(STATUS)[:size])
        assert rude.finish() == []


@pytest.mark.claim("C3")
def test_half_a_command_changes_nothing(sp: RunningSp) -> None:
    vm_id = sp.new_vm()
    frame = encode_frame(encode_message(messages.LaunchVm(vm_id=vm_id)))
    with Rude(sp) as rude:
        rude.say(frame[:-1])
        assert rude.finish() == []
    assert (sp.vm(vm_id).state, sp.vm(vm_id).boots) == ("stopped", 0)
    sp.destroy(vm_id)


# Connections


def test_a_connection_that_never_finishes_its_request_keeps_nobody_waiting(sp: RunningSp) -> None:
    with Rude(sp) as slow, Rude(sp) as polite:
        slow.say(encode_frame(STATUS)[:-1])
        assert isinstance(polite.ask(STATUS), Status)
        slow.say(encode_frame(STATUS)[-1:])
        assert isinstance(slow.hear(), Status)


def test_a_connection_that_never_reads_its_answers_keeps_nobody_waiting(sp: RunningSp) -> None:
    with Rude(sp) as deaf, Rude(sp) as polite:
        deaf.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:  # until the SP waits for it, and takes no more
                deaf.socket.send(encode_frame(STATUS) * 10)
        assert isinstance(polite.ask(STATUS), Status)


@pytest.mark.attack("A23")
def test_more_connections_than_allowed_are_told_so_and_the_others_go_on(sp: RunningSp) -> None:
    with ExitStack() as stack:
        held = []
        for _ in range(MAX_CONNECTIONS - 1):  # one more is held by the fixture
            held.append(stack.enter_context(SecureProcessorClient(sp.socket)))
            assert isinstance(held[-1].call(messages.GetStatus()), Status)
        for _ in range(3):
            with Rude(sp) as refused:
                assert refusal(refused.hear()) == "resource"
                assert refused.hear() is None
        with SecureProcessorClient(sp.socket) as client, pytest.raises(ResourceError, match=f"{MAX_CONNECTIONS} conn"):
            client.call(messages.GetStatus())
        for client in held:
            assert isinstance(client.call(messages.GetStatus()), Status)
    with Rude(sp) as rude:  # those that left gave their places back
        rude.finish()
    assert isinstance(sp.call(messages.GetStatus()), Status)


@pytest.mark.attack("A23")
def test_connections_that_have_ended_leave_no_descriptor(sp: RunningSp) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{sp.process.pid}/fd"))  # noqa: PTH208

    def visit(said: bytes) -> None:
        with Rude(sp) as rude:
            rude.say(said)
            rude.finish()

    visit(b"")
    before = descriptors()
    for said in (b"", encode_frame(STATUS), encode_frame(STATUS)[:7], bytes(4), encode_frame(b"\xc1")) * 40:
        visit(said)
    assert descriptors() == before


def test_connections_that_leave_without_a_word_are_forgotten(sp: RunningSp) -> None:
    for number in range(2 * MAX_CONNECTIONS):
        with Rude(sp) as rude:
            rude.say(encode_frame(STATUS) * (number % 3))
    with Rude(sp) as rude:
        rude.finish()
    assert isinstance(sp.call(messages.GetStatus()), Status)


def test_a_command_is_carried_out_though_its_connection_has_gone(sp: RunningSp) -> None:
    vm_id = sp.new_vm()
    with Rude(sp) as rude:
        rude.say(encode_frame(encode_message(messages.LaunchVm(vm_id=vm_id))))
        rude.finish()
    assert sp.info(messages.StopVm(vm_id=vm_id)).state == "stopped"
    sp.destroy(vm_id)


@pytest.mark.attack("A27")
def test_the_socket_and_the_directories_around_it_are_the_owners_alone(sp: RunningSp) -> None:
    assert sp.socket.stat().st_mode & 0o777 == 0o600
    for directory in (sp.socket.parent, sp.state):
        assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.attack("A27")
def test_a_secure_processor_that_allows_nobody_refuses_everybody(state_directory: Path) -> None:
    with (
        RunningSp(state_directory, "allowed_uids = []\n") as closed,
        SecureProcessorClient(closed.socket) as client,
        pytest.raises(SpvtpmError) as refused,
    ):
        client.call(messages.GetStatus())
    assert refused.value.code == "permission"
