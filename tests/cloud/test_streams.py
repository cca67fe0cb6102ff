"""Streams of an operation's events: what it is, each change, its end; bounded, and ended in order."""

from __future__ import annotations

import select
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import httpx
import msgspec
import pytest

from spvtpm.cloud import operations, tables
from spvtpm.wire.platform_api import Operation
from tests.cloud.served import ServedPlatform, new_vm, problem

STREAMS = 3


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedPlatform]:
    """A replica that has no host, and streams for few."""
    with ServedPlatform(tmp_path / "p", limits={"streams_per_user": STREAMS, "patience_s": 1.0}) as running:
        yield running


@pytest.fixture
def alice(served: ServedPlatform) -> Iterator[httpx.Client]:
    """A user."""
    with served.client(served.token("alice", "vms")) as client:
        yield client


def put_operation(served: ServedPlatform, user: str = "alice") -> uuid.UUID:
    """An operation that nobody works on: it is handed over, as it seems."""
    operation_id = uuid.uuid4()
    with served.database.write() as connection:
        connection.execute(
            tables.operations.insert().values(
                operation_id=operation_id,
                user=user,
                kind="start",
                vm_id=uuid.uuid4(),
                vm_name="web",
                sequence=1,
                state="queued",
                step="waiting",
                steps_done=0,
                steps=2,
                request_sha256=bytes(32),
                handed_over=True,
                created_s=4e9,  # lies ahead, so that nobody takes it for abandoned
                changed_s=4e9,
            )
        )
    return operation_id


def told(lines: Iterator[str]) -> Operation:
    """The next event."""
    assert next(lines) == "event: operation"
    operation = msgspec.json.decode(next(lines).removeprefix("data: "), type=Operation)
    assert next(lines) == ""
    return operation


def test_a_stream_tells_what_is_then_each_change_until_the_end(served: ServedPlatform, alice: httpx.Client) -> None:
    operation_id = put_operation(served)
    with alice.stream("GET", f"/v1/operations/{operation_id}/events") as response:
        assert response.headers["content-type"] == "text/event-stream"
        lines = response.iter_lines()
        assert told(lines).state == "queued"
        with served.database.write() as connection:
            operations.record_progress(connection, operation_id, step="booting the VM", steps_done=1)
        running = told(lines)
        assert (running.state, running.step, running.steps_done) == ("running", "booting the VM", 1)
        with served.database.write() as connection:
            operations.end(connection, operation_id, None)
        assert told(lines).state == "done"
        assert list(lines) == []
    assert len(alice.get(f"/v1/operations/{operation_id}/events").text.splitlines()) == 3  # of one that has ended


def test_a_real_operation_is_followed_to_its_end(alice: httpx.Client) -> None:
    operation_id = alice.post("/v1/vms", json=new_vm()).json()["operation_id"]
    with alice.stream("GET", f"/v1/operations/{operation_id}/events") as response:
        lines = response.iter_lines()
        last = told(lines)
        while last.state not in {"done", "failed"}:
            last = told(lines)
    assert last.error is not None
    assert last.error.code == "no-host"


@pytest.mark.attack("A23")
def test_a_user_has_so_many_streams_and_gets_them_back(served: ServedPlatform, alice: httpx.Client) -> None:
    path = f"/v1/operations/{put_operation(served)}/events"
    with ExitStack() as open_streams:
        kept = []  # an iterator that is dropped closes its stream
        for _ in range(STREAMS):
            kept.append(open_streams.enter_context(alice.stream("GET", path)).iter_lines())
            assert next(kept[-1]) == "event: operation"
        refused = alice.get(path)
        assert (refused.status_code, problem(refused).code) == (429, "too-many")
        with served.client(served.token("bob", "read")) as bob:  # others are not concerned
            put = put_operation(served, "bob")
            with bob.stream("GET", f"/v1/operations/{put}/events") as response:
                assert response.status_code == 200
    for _ in range(1000):  # until the replica has noticed that they are closed
        with alice.stream("GET", path) as response:
            if response.status_code == 200:
                return
    pytest.fail("no place came back")


def test_streams_end_when_the_replica_ends(served: ServedPlatform, alice: httpx.Client) -> None:
    with alice.stream("GET", f"/v1/operations/{put_operation(served)}/events") as response:
        lines = response.iter_lines()
        told(lines)
        assert served.stop() == 0
        assert list(lines) == []
    assert "Traceback" not in served.log()


# Clients that are slow


def connect(served: ServedPlatform) -> socket.socket:
    """A connection whose other end is the replica."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    connection.connect(str(served.socket))
    return connection


def rest(file: IO[bytes]) -> bytes:
    """What still comes; nothing if the other side breaks it off."""
    try:
        return file.read()
    except ConnectionResetError:
        return b""


@pytest.mark.attack("A23")
@pytest.mark.parametrize(
    "begun", [b"", b"GET /v1/me HTTP/1.1\r\nHost: x\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET "]
)
def test_who_does_not_finish_a_request_is_left(served: ServedPlatform, begun: bytes) -> None:
    with connect(served) as connection, connection.makefile("rb") as file:
        connection.sendall(begun)
        answer = rest(file)
    assert answer.count(b"HTTP/1.1") == begun.count(b"\r\n\r\n")


@pytest.mark.attack("A23")
def test_whose_body_does_not_come_is_told_and_left(served: ServedPlatform) -> None:
    token = served.token("alice", "vms")
    head = f"POST /v1/vms HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 100\r\n\r\n{{"
    with connect(served) as connection, connection.makefile("rb") as file:
        connection.sendall(head.encode())
        answer = rest(file)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"did not come within 1 s" in answer


@pytest.mark.attack("A23")
def test_who_does_not_take_an_answer_is_left(served: ServedPlatform) -> None:
    with connect(served) as connection:
        connection.setblocking(False)
        with suppress(BlockingIOError):  # until there is no room for more requests, since no answer is taken
            while True:
                connection.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        end = select.poll()
        end.register(connection, 0)  # for POLLHUP alone
        assert end.poll(30_000)
