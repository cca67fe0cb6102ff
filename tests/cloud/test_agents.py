"""The platform's end of the agents' API, with agents that answer whatever they like."""

from __future__ import annotations

import gzip
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from spvtpm.cloud.agents import Agent, Agents
from spvtpm.wire.agent_api import Order
from spvtpm.wire.errors import MessageError, NotFound, SpvtpmError
from spvtpm.wire.platform_errors import NoSuchToken, Superseded, TooLarge, Unavailable
from tests.cloud.agent_double import TOKEN, AgentDouble

VM = uuid.UUID(int=7)


@pytest.fixture
def double(short_path: Path) -> Iterator[AgentDouble]:
    with AgentDouble(short_path / "h1.sock") as one:
        yield one


@pytest.fixture
def agent(double: AgentDouble) -> Iterator[Agent]:
    agents = Agents()
    yield agents.agent("h1", double.address, TOKEN)
    agents.close()


def test_many_vms_come_in_pages(double: AgentDouble, agent: Agent) -> None:
    ids = sorted(uuid.uuid4() for _ in range(300))
    for vm_id in ids:
        agent.order(vm_id, Order(sequence=1, want="defined"))
    assert [report.vm_id for report in agent.vm_reports()] == ids


def test_what_the_agent_refuses_is_raised_as_it_says_it(double: AgentDouble, agent: Agent) -> None:
    agent.order(VM, Order(sequence=9, want="defined"))
    with pytest.raises(Superseded, match="order 5 is older than 9"):
        agent.order(VM, Order(sequence=5, want="absent"))
    with pytest.raises(NotFound, match="no image"):
        agent.image(VM)
    stranger = Agent("h1", double.address, "x" * 40)
    with pytest.raises(NoSuchToken):
        stranger.host_report()
    stranger.close()


def test_an_agent_that_is_away_is_named(double: AgentDouble, agent: Agent) -> None:
    double.down()
    with pytest.raises(Unavailable, match="host h1 does not answer"):
        agent.host_report()
    double.up()
    assert agent.host_report().chip_id == double.chip_id


def test_no_proxy_of_the_environment_is_asked(
    double: AgentDouble, monkeypatch: pytest.MonkeyPatch, short_path: Path
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    agent = Agent("h1", double.address, TOKEN)
    assert agent.host_report().chip_id == double.chip_id
    agent.close()


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", MessageError),
        (b"{", MessageError),
        (b"[" * 100_000, MessageError),
        (b"\xff", MessageError),
        (gzip.compress(b" " * 1000), MessageError),
        (b" " * (4 << 20) + b"{}", TooLarge),
        (msgspec.json.encode({"chip_id": "up"}), MessageError),
    ],
    ids=["nothing", "half", "nested", "no text", "packed", "long", "no id"],
)
def test_nonsense_is_a_typed_error(
    double: AgentDouble, agent: Agent, monkeypatch: pytest.MonkeyPatch, answer: bytes, error: type[SpvtpmError]
) -> None:
    monkeypatch.setattr(double, "answer", lambda *_: answer)
    asked: list[Callable[[], object]] = [
        agent.host_report,
        lambda: list(agent.vm_reports()),
        lambda: agent.vm_report(VM),
        lambda: agent.order(VM, Order(sequence=1, want="defined")),
    ]
    for ask in asked:
        with pytest.raises(error):
            ask()


@pytest.mark.attack("A25")
def test_an_image_without_end_is_not_kept(double: AgentDouble, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double, "answer", lambda *_: b"i" * ((16 << 20) + 1))
    with pytest.raises(TooLarge):
        agent.image(VM)


@pytest.mark.attack("A25")
def test_pages_without_end_or_order_and_other_vms_are_refused(
    double: AgentDouble, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = msgspec.json.encode({"vms": [double.report(VM)], "more": True})
    monkeypatch.setattr(double, "answer", lambda *_: page)
    with pytest.raises(MessageError, match="no order"):
        list(agent.vm_reports())
    monkeypatch.setattr(double, "answer", lambda *_: msgspec.json.encode(double.report(uuid.UUID(int=8))))
    with pytest.raises(MessageError, match="another VM"):
        agent.vm_report(VM)
