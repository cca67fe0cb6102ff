"""The agent carries frames to the secure processor and to VMs: as they are, bounded, and for whoever has the token."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection

from spvtpm.hypervisor.relay import MAX_CHANNELS, MAX_CONSOLES_OF_ONE_VM
from spvtpm.terminal.console import run_command
from spvtpm.wire.errors import ChannelError, SpvtpmError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES, Knock, Papers, encode_clear, parse_clear
from spvtpm.wire.problems import error_of
from tests.hypervisor.running_agent import PATIENCE_S, RunningAgent

_MIB = 1 << 20


class WebSocketRelay:
    """The terminal's `Relay` over the agent's WebSocket."""

    def __init__(self, agent: RunningAgent, path: str) -> None:
        self._end = ExitStack()
        self._connection = self._end.enter_context(agent.websocket(path))

    def deadline(self) -> float:
        return time.monotonic() + PATIENCE_S

    def send(self, frames: Iterable[bytes]) -> None:
        try:
            for frame in frames:
                self._connection.send(frame)
        except ConnectionClosed as closed:  # whoever has said all may close first
            raise ChannelError(str(closed)) from None

    def receive(self, deadline: float) -> bytes:
        try:
            frame = self._connection.recv(max(deadline - time.monotonic(), 0))
        except ConnectionClosed as closed:
            raise ChannelError(str(closed)) from None
        assert isinstance(frame, bytes)
        return frame

    def close(self) -> None:
        self._end.close()


def _refused(agent: RunningAgent, path: str) -> SpvtpmError:
    with pytest.raises(InvalidStatus) as refused, agent.websocket(path):
        pass
    return error_of(bytes(refused.value.response.body), refused.value.response.status_code)


def _close_code(connection: ClientConnection) -> int:
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            connection.recv(PATIENCE_S)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


def test_a_knock_through_the_agent_is_answered_with_the_chips_papers(agent: RunningAgent) -> None:
    with agent.websocket("/v1/channel") as connection:
        connection.send(encode_clear(Knock()))
        answer = connection.recv(PATIENCE_S)

    assert isinstance(answer, bytes)
    assert isinstance(parse_clear(answer), Papers)


def test_a_command_in_a_vm_goes_through_the_agent_which_sees_ciphertext(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    written: list[bytes] = []

    def way(_timeout_s: float) -> WebSocketRelay:
        return WebSocketRelay(agent, f"/v1/vms/{vm_id}/console")

    run = ("sh", "-c", "head -c 3000000 /dev/zero; exit 7")
    code = run_command(way, agent.sp.key(vm_id), vm_id, run, lambda _stream, data: written.append(data))

    assert code == 7
    assert sum(map(len, written)) == 3_000_000


def test_there_is_no_console_of_a_vm_that_does_not_run(agent: RunningAgent) -> None:
    vm_id = agent.new_vm()

    for path, code in ((f"/v1/vms/{vm_id}/console", "wrong-state"), (f"/v1/vms/{uuid.uuid4()}/console", "not-found")):
        assert _refused(agent, path).code == code


def test_a_channel_is_refused_while_the_secure_processor_is_away(agent: RunningAgent) -> None:
    agent.sp.kill()

    assert _refused(agent, "/v1/channel").code == "not-running"


@pytest.mark.parametrize(
    ("message", "code"),
    [("text", 1003), (b"", 1007), (bytes(MAX_CHANNEL_FRAME_BYTES + 1), 1009)],
    ids=["text", "empty", "overlong"],
)
@pytest.mark.attack("A25")
def test_what_is_no_frame_ends_the_relay_with_the_code_that_says_why(
    agent: RunningAgent, message: str | bytes, code: int
) -> None:
    with agent.websocket("/v1/channel") as connection:
        connection.send(message)

        assert _close_code(connection) == code


def test_what_the_secure_processor_says_last_comes_through_before_the_end(agent: RunningAgent) -> None:
    with agent.websocket("/v1/channel") as connection:
        connection.send(b"no knock")

        assert isinstance(connection.recv(PATIENCE_S), bytes)  # its refusal, in clear
        assert _close_code(connection) == 1000


@pytest.mark.attack("A23")
def test_so_many_consoles_of_one_vm_at_a_time_and_room_again_when_one_ends(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    path = f"/v1/vms/{vm_id}/console"
    with ExitStack() as consoles:
        for _ in range(MAX_CONSOLES_OF_ONE_VM - 1):
            consoles.enter_context(agent.websocket(path))
        with agent.websocket(path):
            refusal = _refused(agent, path)
        _enter_once_there_is_room(agent, path, consoles)

    assert refusal.code == "too-many"


def _enter_once_there_is_room(agent: RunningAgent, path: str, consoles: ExitStack) -> None:
    while True:
        try:
            consoles.enter_context(agent.websocket(path))
        except InvalidStatus as refused:
            assert error_of(bytes(refused.response.body), refused.response.status_code).code == "too-many"
        else:
            return


@pytest.mark.attack("A23")
def test_channels_opened_and_left_do_not_keep_the_agent_from_reporting(agent: RunningAgent) -> None:
    with ExitStack() as channels:
        for _ in range(MAX_CHANNELS):
            channels.enter_context(agent.websocket("/v1/channel"))

        assert {_refused(agent, "/v1/channel").code for _ in range(40)} == {"too-many"}
        assert agent.host().vms == 0


class _Flood:
    """Stands at the place of the secure processor's channel socket, and sends or takes as told."""

    def __init__(self, path: Path) -> None:
        path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()

    def accept(self) -> socket.socket:
        connection, _address = self._listener.accept()
        return connection

    def close(self) -> None:
        self._listener.close()


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.attack("A23")
def test_whoever_reads_slowly_makes_the_sender_wait_and_the_agent_holds_little(agent: RunningAgent) -> None:
    flood = _Flood(agent.sp.state / "run" / "channel.sock")
    assert agent.process is not None
    with agent.websocket("/v1/channel", max_queue=1) as connection:
        sender = flood.accept()
        before = _resident_bytes(agent.process.pid)
        sender.settimeout(2)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 256 * _MIB:
                sender.sendall(encode_frame(bytes(MAX_CHANNEL_FRAME_BYTES)))
                sent += MAX_CHANNEL_FRAME_BYTES
        held = _resident_bytes(agent.process.pid) - before

        got = sum(len(connection.recv(PATIENCE_S)) for _ in range(sent // MAX_CHANNEL_FRAME_BYTES))
        sender.close()
    flood.close()

    assert sent < 8 * _MIB and held < 8 * _MIB
    assert got == sent


def _push(connection: ClientConnection, messages: int) -> None:
    for _ in range(messages):
        connection.send(bytes(MAX_CHANNEL_FRAME_BYTES))


@pytest.mark.attack("A23")
def test_a_host_that_takes_slowly_makes_the_platform_wait_and_the_agent_holds_little(agent: RunningAgent) -> None:
    flood = _Flood(agent.sp.state / "run" / "channel.sock")
    assert agent.process is not None
    messages = 512
    with agent.websocket("/v1/channel") as connection:
        taker = flood.accept()
        before = _resident_bytes(agent.process.pid)
        pushing = threading.Thread(target=_push, args=(connection, messages))
        pushing.start()
        pushing.join(2)
        is_waiting, held = pushing.is_alive(), _resident_bytes(agent.process.pid) - before
        decoder, got = FrameDecoder(MAX_CHANNEL_FRAME_BYTES), 0
        while got < messages:
            got += len(decoder.feed(taker.recv(_MIB)))
        pushing.join()
        taker.close()
    flood.close()

    assert is_waiting
    assert held < 8 * _MIB


@pytest.mark.attack("A25")
def test_a_host_that_sends_no_frames_ends_the_relay(agent: RunningAgent) -> None:
    flood = _Flood(agent.sp.state / "run" / "channel.sock")
    with agent.websocket("/v1/channel") as connection:
        sender = flood.accept()
        sender.sendall((MAX_CHANNEL_FRAME_BYTES + 1).to_bytes(4, "big"))

        assert _close_code(connection) == 1008
        sender.close()
    flood.close()
