"""Debian's Chromium, watched: where its requests go, and what it complains of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def launched() -> Iterator[Browser]:
    """The browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_ARGUMENTS))
        yield browser
        browser.close()


class Watched:
    """What a browser's pages did.

    Attributes:
        context: of the browser.
        requested: origins that requests went to.
        complaints: errors and warnings of its console; a violated Content-Security-Policy is among them.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.requested: set[str] = set()
        self.complaints: list[str] = []
        context.on(
            "request", lambda request: self.requested.add("{0.scheme}://{0.netloc}".format(urlsplit(request.url)))
        )
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.on(
            "console",
            lambda message: self.complaints.append(message.text) if message.type in {"error", "warning"} else None,
        )


@contextmanager
def watching(browser: Browser, origin: str) -> Iterator[Watched]:
    """A browser's context of its own; that it stayed in the origin and had nothing to complain of is seen at the end."""
    context = browser.new_context(base_url=origin)
    watched = Watched(context)
    yield watched
    context.close()
    assert watched.requested == {origin}, watched.requested
    assert not watched.complaints, watched.complaints


def log_in(page: Page, token: str) -> None:
    """By keyboard alone: the field has the focus."""
    page.goto("/console")
    expect(page.get_by_label("Token")).to_be_focused()
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
