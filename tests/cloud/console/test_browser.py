"""The console in a real browser: keyboard, live pages, light and dark, and not one request to anywhere else."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.cloud.console.browsing import CHROMIUM, Watched, log_in, watching
from tests.cloud.console.conftest import Console

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture
def watched(console: Console, browser: Browser) -> Iterator[Watched]:
    console.filled.fill()
    with watching(browser, console.origin) as watched:
        yield watched


def test_everything_is_reached_by_keyboard_alone(console: Console, watched: Watched) -> None:
    page = watched.context.new_page()
    log_in(page, console.filled.tokens["alice"])
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")  # the first link of the content: VMs
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("VMs")
    page.get_by_role("link", name="web").focus()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="web")).to_be_focused()
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("web")


def test_an_operation_goes_on_before_ones_eyes(console: Console, watched: Watched) -> None:
    operation_id = console.filled.add_operation("alice", "web")
    page = watched.context.new_page()
    log_in(page, console.filled.tokens["alice"])
    page.goto(f"/console/operations/{operation_id}")
    expect(page.locator("#connection")).to_have_text("live")
    page.evaluate("document.isTheSame = true")
    bar, link = page.get_by_role("progressbar"), page.get_by_role("link", name="web")
    link.focus()
    expect(bar).to_have_attribute("value", "1")
    console.filled.change_operation(operation_id, step="booting the VM", steps_done=3)
    expect(bar).to_have_attribute("value", "3")
    expect(page.locator("#spoken")).to_have_text("start web: 3 of 4 steps done; booting the VM.")
    expect(link).to_be_focused()
    console.filled.change_operation(operation_id, step="done", steps_done=4, state="done")
    expect(page.locator("h1")).to_contain_text("done")
    expect(page.locator("#connection")).to_be_hidden()
    assert page.title() == "start web: done · spvtpm"
    assert page.evaluate("document.isTheSame") is True


def test_a_vms_page_shows_what_happens_to_it(console: Console, watched: Watched) -> None:
    page = watched.context.new_page()
    log_in(page, console.filled.tokens["alice"])
    page.goto(f"/console/vms/{console.filled.vms['web']}")
    expect(page.locator("#connection")).to_have_text("live")
    console.filled.add_event(console.filled.vms["web"], "secret-refused", "another process asked for the VM key")
    expect(page.locator(".timeline li").first).to_contain_text("another process asked for the VM key")


def test_a_hostile_name_is_text_also_when_it_arrives_live(console: Console, watched: Watched) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    page = watched.context.new_page()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    log_in(page, console.filled.tokens["alice"])
    page.goto("/console/vms")
    expect(page.locator("#connection")).to_have_text("live")
    console.filled.add_vm("alice", hostile)
    expect(page.get_by_role("link", name=hostile)).to_be_visible()
    assert page.locator("main img").count() == 0


def test_a_page_leads_to_the_login_when_its_session_ends(console: Console, watched: Watched) -> None:
    page = watched.context.new_page()
    log_in(page, console.filled.tokens["alice"])
    other = watched.context.new_page()
    other.goto("/console/")
    other.get_by_role("button", name="Log out").click()
    expect(other.get_by_label("Token")).to_be_focused()
    expect(page.get_by_label("Token")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_light_or_dark_as_the_reader_likes(console: Console, watched: Watched, scheme: str) -> None:
    page = watched.context.new_page()
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    log_in(page, console.filled.tokens["alice"])
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red + green + blue < 150) == (scheme == "dark")


def test_a_narrow_window_need_not_be_scrolled_sideways(console: Console, watched: Watched) -> None:
    console.filled.add_vm("alice", "a" * 63, failure="x" * 500)
    page = watched.context.new_page()
    page.set_viewport_size({"width": 360, "height": 700})
    log_in(page, console.filled.tokens["alice"])
    paths = ["/console/", "/console/vms", "/console/operations", "/console/hosts", "/console/tokens"]
    for path in (*paths, f"/console/vms/{console.filled.vms['a' * 63]}"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


def test_all_of_it_works_without_scripts(console: Console, browser: Browser) -> None:
    console.filled.fill()
    operation_id = console.filled.add_operation("alice", "web", step="choosing a host")
    context = browser.new_context(base_url=console.origin, java_script_enabled=False)
    page = context.new_page()
    log_in(page, console.filled.tokens["alice"])
    for path, text in (
        ("/console/vms", "web"),
        (f"/console/operations/{operation_id}", "choosing a host"),
        (f"/console/vms/{uuid.UUID(int=1)}", "there is no VM"),
    ):
        page.goto(path)
        expect(page.get_by_role("main")).to_contain_text(text)
    page.goto(f"/console/operations/{operation_id}")
    console.filled.change_operation(operation_id, step="done", steps_done=4, state="done")
    expect(page.locator("h1")).to_contain_text("done", timeout=30_000)  # the page comes again by itself
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    context.close()
