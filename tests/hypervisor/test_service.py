"""Whatever comes to the agent's API, problem details answer it, and the agent lives."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from spvtpm.wire.agent_api import MAX_IMAGE_BYTES
from spvtpm.wire.problems import PROBLEM_TYPE
from tests.harness import RunningSp
from tests.hypervisor.running_agent import RunningAgent

VM = "6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11"


@pytest.fixture(scope="module")
def agent() -> Iterator[RunningAgent]:
    """One agent for all tests here: they change nothing."""
    with (
        TemporaryDirectory(prefix="spvtpm-") as directory,
        RunningSp(Path(directory) / "sp") as sp,
        RunningAgent(sp) as running,
    ):
        yield running


def _problem(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_TYPE
    problem = response.json()
    assert problem["status"] == status
    assert problem["detail"] and problem["hint"]
    code: str = problem["code"]
    return code


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"sequence": 1}',
        b'{"sequence": 0, "want": "running"}',
        b'{"sequence": -1, "want": "running"}',
        b'{"sequence": 9007199254740992, "want": "running"}',
        b'{"sequence": 1.5, "want": "running"}',
        b'{"sequence": "1", "want": "running"}',
        b'{"sequence": 1, "want": "exploded"}',
        b'{"sequence": 1, "want": "running", "more": 1}',
        b'{"sequence": 1, "want": "running"} trailing',
        b'{"sequence": 1, "want": "\xff\xfe"}',
        b"[" * 4000,
    ],
)
def test_what_is_no_order_is_refused(agent: RunningAgent, body: bytes) -> None:
    assert _problem(agent.http.put(f"/v1/vms/{VM}", content=body), 400) == "bad-message"
    assert agent.report(uuid.UUID(VM)).sequence == 0


@pytest.mark.attack("A23")
def test_an_order_and_an_image_have_their_bounds(agent: RunningAgent) -> None:
    image = f"/v1/vms/{VM}/image?sequence=1"

    assert _problem(agent.http.put(f"/v1/vms/{VM}", content=bytes(4097)), 413) == "too-large"
    assert _problem(agent.http.put(image, content=bytes(MAX_IMAGE_BYTES + 1)), 413) == "too-large"
    assert _problem(agent.http.put(image, content=(bytes(65_536) for _ in range(300))), 413) == "too-large"
    assert not agent.report(uuid.UUID(VM)).image


@pytest.mark.attack("A25")
@pytest.mark.parametrize("query", ["", "?sequence=", "?sequence=0", "?sequence=-1", "?sequence=x", "?sequence=²"])
def test_an_image_without_a_number_is_refused(agent: RunningAgent, query: str) -> None:
    assert _problem(agent.http.put(f"/v1/vms/{VM}/image{query}", content=b"image"), 400) == "bad-message"


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/vms/not-an-id", 404),
        ("GET", "/v1/vms/../../token", 404),
        ("POST", "/v1/host", 405),
        ("DELETE", f"/v1/vms/{VM}", 405),
        ("GET", "/v1/vms?after=x", 400),
        ("GET", "/v1/channel", 404),
        ("GET", f"/v1/vms/{VM}/image", 404),
    ],
)
def test_what_is_not_there_is_said_in_problem_details(agent: RunningAgent, method: str, path: str, status: int) -> None:
    _problem(agent.http.request(method, path), status)


@pytest.mark.parametrize("token", ["x", "x" * 43, "Ångström-no-token-is-like-this"])
def test_nobody_gets_in_without_the_token(agent: RunningAgent, token: str) -> None:
    headers = {b"Authorization": f"Bearer {token}".encode()}

    for method, path in (("GET", "/v1/host"), ("GET", "/nothing"), ("PUT", f"/v1/vms/{VM}")):
        response = agent.http.request(method, path, headers=headers)
        assert _problem(response, 401) == "no-token"
        assert response.headers["www-authenticate"] == "Bearer"


def test_nobody_gets_a_relay_without_the_token(agent: RunningAgent) -> None:
    for path in ("/v1/channel", f"/v1/vms/{VM}/console"):
        with pytest.raises(InvalidStatus) as refused, agent.websocket(path, token="x" * 43):
            pass
        assert refused.value.response.status_code == 401
        assert json.loads(refused.value.response.body)["code"] == "no-token"


def test_a_vm_that_is_nowhere_is_reported_as_such(agent: RunningAgent) -> None:
    report = agent.report(uuid.UUID(VM))

    assert (report.sequence, report.want, report.machine, report.security_block) == (0, None, "none", None)
    assert not agent.reports()


def test_the_socket_and_the_token_are_closed_to_others(agent: RunningAgent) -> None:
    for name in ("agent.sock", "token"):
        assert (agent.directory / name).stat().st_mode & 0o077 == 0


@pytest.mark.attack("A24")
def test_the_log_does_not_have_the_token(agent: RunningAgent) -> None:
    agent.http.get("/v1/host")

    assert agent.token not in agent.log()
