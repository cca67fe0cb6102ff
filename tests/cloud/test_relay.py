"""The relay: frames both ways, as they are; bounds, refusals before the upgrade, and a log that knows sizes alone."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from websockets.sync.server import ServerConnection

from spvtpm.wire.errors import NotRunning
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES
from spvtpm.wire.platform_errors import NoSuchToken
from spvtpm.wire.problems import Problem
from tests.cloud.agent_double import TOKEN
from tests.cloud.served import REPORT, RelayAgent, ServedPlatform
from tests.cloud.test_api import put_vm

CHANNEL = f"/v1/chips/{REPORT.chip_id}/channel"
LIMITS = {"relays_per_user": 3, "relays_per_host": 4, "relay_idle_s": 2.0, "patience_s": 2.0}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RelayAgent]:
    """The agent of host h1."""
    double = RelayAgent(tmp_path / "agent.sock")
    yield double
    double.close()


@pytest.fixture
def served(tmp_path: Path, agent: RelayAgent) -> Iterator[ServedPlatform]:
    """A replica that knows h1."""
    with ServedPlatform(tmp_path / "p", limits=LIMITS) as running:
        running.add_host("h1", agent.address)
        yield running


@pytest.fixture
def alice(served: ServedPlatform) -> str:
    """A user's token."""
    return served.token("alice", "vms")


def refusal(served: ServedPlatform, path: str, token: str | None) -> Problem:
    """Why a WebSocket is not opened."""
    with pytest.raises(InvalidStatus) as refused:
        served.websocket(path, token)
    response = refused.value.response
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = msgspec.json.decode(response.body or b"", type=Problem)
    assert problem.status == response.status_code
    return problem


def code_at_end(websocket: ClientConnection) -> int:
    """How the other side ends it."""
    with pytest.raises(ConnectionClosed):
        while True:
            websocket.recv(timeout=30)
    assert websocket.close_code is not None
    return websocket.close_code


def test_frames_go_both_ways_as_they_are(served: ServedPlatform, agent: RelayAgent, alice: str) -> None:
    frames = [os.urandom(size) for size in (1, 1000, MAX_CHANNEL_FRAME_BYTES, 17)]
    with served.websocket(CHANNEL, alice) as websocket:
        for frame in frames:
            websocket.send(frame)
            assert websocket.recv(timeout=30) == frame
    assert agent.asked == [("/v1/channel", f"Bearer {TOKEN}")]
    served.stop()
    line = next(line for line in served.log().splitlines() if "relayed" in line)
    total = sum(map(len, frames))
    counted = f"to the host {len(frames)} frames, {total} bytes; from it {len(frames)} frames, {total} bytes"
    assert f"channel of chip {REPORT.chip_id}, user alice, host h1: {counted}" in line
    assert TOKEN not in served.log()


def test_a_console_leads_to_the_host_of_ones_own_vm(served: ServedPlatform, agent: RelayAgent, alice: str) -> None:
    vm_id = put_vm(served.database, "alice", "web", host="h1")
    with served.websocket(f"/v1/vms/{vm_id}/console", alice) as websocket:
        websocket.send(b"frame")
        assert websocket.recv(timeout=30) == b"frame"
    assert agent.asked == [(f"/v1/vms/{vm_id}/console", f"Bearer {TOKEN}")]
    away = put_vm(served.database, "alice", "away", state="away")
    assert refusal(served, f"/v1/vms/{away}/console", alice).code == "wrong-state"


@pytest.mark.attack("A05")
def test_another_users_console_is_as_one_that_does_not_exist(
    served: ServedPlatform, agent: RelayAgent, alice: str
) -> None:
    vm_id = str(put_vm(served.database, "alice", "web", host="h1"))
    bob, admin = served.token("bob", "vms"), served.token("root", "vms", "admin")
    nowhere = "00000000-0000-4000-8000-000000000000"
    for token in (bob, admin):
        told = refusal(served, f"/v1/vms/{vm_id}/console", token)
        assert told.code == "not-found"
        assert told.detail.replace(vm_id, nowhere) == refusal(served, f"/v1/vms/{nowhere}/console", token).detail
    assert not agent.asked


def test_refusals_come_before_the_upgrade(served: ServedPlatform, agent: RelayAgent, alice: str) -> None:
    assert refusal(served, CHANNEL, None).code == "no-token"
    assert refusal(served, CHANNEL, "spv_" + "A" * 43).code == "no-token"
    assert refusal(served, CHANNEL, served.token("alice", "read")).code == "scope"
    assert refusal(served, f"/v1/chips/{'ff' * 16}/channel", alice).code == "not-found"
    assert refusal(served, "/v1/chips/x/channel", alice).code == "not-found"
    assert refusal(served, "/v1/nothing", alice).status == 404
    assert not agent.asked
    agent.refusal = NotRunning("no secure processor runs here")
    assert refusal(served, CHANNEL, alice).code == "not-running"
    agent.refusal = NoSuchToken("who are you")  # is between platform and agent
    assert refusal(served, CHANNEL, alice).code == "unavailable"


def test_a_host_that_is_away_is_unavailable_and_then_back(served: ServedPlatform, tmp_path: Path, alice: str) -> None:
    elsewhere = tmp_path / "other.sock"
    served.add_host("h1", f"unix:{elsewhere}")
    assert refusal(served, CHANNEL, alice).code == "unavailable"
    double = RelayAgent(elsewhere)
    with served.websocket(CHANNEL, alice) as websocket:
        websocket.send(b"frame")
        assert websocket.recv(timeout=30) == b"frame"
    double.close()


@pytest.mark.attack("A25")
def test_text_and_frames_too_long_end_it_from_either_side(
    served: ServedPlatform, agent: RelayAgent, alice: str
) -> None:
    with served.websocket(CHANNEL, alice) as websocket:
        websocket.send("text")
        assert code_at_end(websocket) == 1003
    with served.websocket(CHANNEL, alice) as websocket:
        websocket.send(bytes(MAX_CHANNEL_FRAME_BYTES + 1))
        assert code_at_end(websocket) == 1009
    for message in ("text", bytes(MAX_CHANNEL_FRAME_BYTES + 1)):
        agent.serve = partial(send_and_drain, message)
        with served.websocket(CHANNEL, alice) as websocket:
            assert code_at_end(websocket) == 1011
    with served.client(alice) as client:
        assert client.get("/v1/me").status_code == 200


def send_and_drain(message: str | bytes, connection: ServerConnection) -> None:
    """Says one thing, then waits until the other side has gone."""
    connection.send(message)
    for _ in connection:
        pass


def test_an_end_at_the_host_is_passed_on(served: ServedPlatform, agent: RelayAgent, alice: str) -> None:
    agent.serve = lambda connection: connection.close(1012)
    with served.websocket(CHANNEL, alice) as websocket:
        assert code_at_end(websocket) == 1012


def test_what_the_host_says_last_is_heard_though_the_user_still_speaks(
    served: ServedPlatform, agent: RelayAgent, alice: str
) -> None:
    def talk(connection: ServerConnection) -> None:
        for _ in range(8):
            connection.send(bytes(MAX_CHANNEL_FRAME_BYTES))
        connection.send(b"last")

    agent.serve = talk
    for _ in range(40):  # it depends on who is quicker
        with served.websocket(CHANNEL, alice) as websocket:
            heard = websocket.recv(timeout=30)
            with suppress(ConnectionClosed):
                for _ in range(8):
                    websocket.send(b"frame")
            while heard != b"last":
                heard = websocket.recv(timeout=30)


@pytest.mark.attack("A23")
def test_a_channel_that_carries_nothing_is_ended(served: ServedPlatform, alice: str) -> None:
    with served.websocket(CHANNEL, alice) as websocket:
        websocket.send(b"frame")
        assert code_at_end(websocket) == 1001


@pytest.mark.attack("A23")
def test_a_user_and_a_host_have_so_many_and_get_them_back(served: ServedPlatform, alice: str) -> None:
    bob = served.token("bob", "vms")
    with ExitStack() as open_ones:
        for _ in range(3):
            open_ones.enter_context(served.websocket(CHANNEL, alice))
        assert "user" in refusal(served, CHANNEL, alice).detail
        open_ones.enter_context(served.websocket(CHANNEL, bob))
        assert "host" in refusal(served, CHANNEL, bob).detail
    deadline = time.monotonic() + 30
    while True:
        try:
            with served.websocket(CHANNEL, alice):
                return
        except InvalidStatus:
            assert time.monotonic() < deadline


@pytest.mark.attack("A23")
def test_a_side_that_does_not_take_frames_holds_the_other_back(
    served: ServedPlatform, agent: RelayAgent, alice: str
) -> None:
    free = threading.Event()

    def stubborn(connection: ServerConnection) -> None:
        connection.socket.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF
        free.wait(60)

    agent.serve = stubborn
    frame, sent = bytes(MAX_CHANNEL_FRAME_BYTES), 0
    assert served.process is not None
    with served.websocket(CHANNEL, alice) as websocket:
        with pytest.raises(ConnectionClosed):  # it stands still, and is ended as one that carries nothing
            for sent in range(10_000):  # noqa: B007
                websocket.send(frame)
        peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{served.process.pid}/status").read_text())
    free.set()
    assert sent < 1000  # else 64 MiB would be somewhere
    assert peak is not None
    assert int(peak[1]) < 400_000


def test_relays_end_when_the_replica_ends(served: ServedPlatform, alice: str) -> None:
    with served.websocket(CHANNEL, alice) as websocket:
        websocket.send(b"frame")
        assert websocket.recv(timeout=30) == b"frame"
        assert served.stop() == 0
        assert code_at_end(websocket) in {1001, 1012}
    assert "Traceback" not in served.log()
