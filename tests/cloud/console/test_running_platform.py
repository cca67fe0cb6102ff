"""The console of a platform that runs as it does for its users: its own process, its workers, a host's agent."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from spvtpm.wire.agent_api import Order
from tests.cloud.agent_double import AgentDouble
from tests.cloud.console.browsing import CHROMIUM, log_in, watching
from tests.cloud.served import REPORT, ServedPlatform, new_vm

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture
def platform(short_path: Path) -> Iterator[ServedPlatform]:
    with ServedPlatform(short_path / "cloud", listen="127.0.0.1:0") as served:
        yield served


@pytest.fixture
def strict_platform(short_path: Path) -> Iterator[ServedPlatform]:
    """A user may have one live page at a time."""
    with ServedPlatform(short_path / "cloud", limits={"streams_per_user": 1}, listen="127.0.0.1:0") as served:
        yield served


@pytest.fixture
def agent(platform: ServedPlatform, short_path: Path) -> Iterator[AgentDouble]:
    with AgentDouble(short_path / "agent.sock", REPORT.chip_id, firmware=REPORT.firmware) as agent:
        platform.add_host("host-1", agent.address)
        yield agent


def test_what_a_terminal_has_the_platform_do_is_seen_as_it_is_done(
    platform: ServedPlatform, agent: AgentDouble, browser: Browser
) -> None:
    token = platform.token("alice", "vms")
    ordered = threading.Event()

    def wait(_vm: uuid.UUID, _order: Order) -> None:
        ordered.wait(60)

    agent.before_order = wait
    with watching(browser, platform.address) as watched:
        page = watched.context.new_page()
        log_in(page, token)
        expect(page.get_by_text(f"spvtpm login {platform.address}")).to_be_visible()
        page.goto("/console/hosts")
        expect(page.get_by_role("row", name="host-1")).to_contain_text("online", timeout=30_000)
        page.goto("/console/")
        expect(page.locator("#connection")).to_have_text("live")
        page.evaluate("document.isTheSame = true")
        answer = httpx.post(
            f"{platform.address}/v1/vms", json=new_vm(), headers={"Authorization": f"Bearer {token}"}, timeout=60
        )
        assert answer.status_code == 202, answer.text
        under_way = page.locator(".card.busy").get_by_role("link", name="create web")
        expect(under_way).to_be_visible(timeout=30_000)
        assert page.evaluate("document.isTheSame") is True
        under_way.click()
        expect(page.get_by_role("progressbar")).to_be_visible()
        page.evaluate("document.isTheSame = true")
        ordered.set()
        expect(page.locator("h1")).to_contain_text("done", timeout=30_000)
        assert page.evaluate("document.isTheSame") is True
        page.get_by_role("link", name="web").click()
        expect(page.locator("h1")).to_have_text("web placed")
        expect(page.get_by_text("spvtpm vm start web")).to_be_visible()
        expect(page.locator(".timeline")).to_contain_text("created")


def test_a_live_page_that_was_refused_tries_again(strict_platform: ServedPlatform, browser: Browser) -> None:
    platform = strict_platform
    token = platform.token("alice", "read")
    with watching(browser, platform.address) as watched, httpx.Client(base_url=platform.address, timeout=60) as client:
        assert client.post("/console/login", data={"token": token}, headers={"Origin": platform.address}).is_redirect
        with client.stream("GET", "/console/", headers={"Accept": "text/event-stream"}) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: page"
            page = watched.context.new_page()
            log_in(page, token)
            expect(page.locator("#connection")).to_have_text("connecting again")
        expect(page.locator("#connection")).to_have_text("live", timeout=60_000)
        assert watched.complaints and all("429" in complaint for complaint in watched.complaints)
        watched.complaints.clear()
