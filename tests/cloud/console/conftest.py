"""A console, served by a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser

from tests.cloud.console.browsing import launched
from tests.cloud.console.filling import FilledDatabase


@dataclass(frozen=True)
class Console:
    """The served console.

    Attributes:
        origin: where it is.
        filled: its database.
        process: that serves it.
    """

    origin: str
    filled: FilledDatabase
    process: subprocess.Popen[bytes]

    @contextmanager
    def client(self, user: str | None = None) -> Iterator[httpx.Client]:
        """A browser without a face; logged in, if a user is named."""
        with httpx.Client(base_url=self.origin, headers={"Origin": self.origin}, timeout=30) as client:
            if user is not None:
                answer = client.post("/console/login", data={"token": self.filled.tokens[user]})
                assert answer.status_code == 303, answer.text
            yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; who asks for it is skipped where that is missing."""
    with launched() as browser:
        yield browser


@pytest.fixture
def console() -> Iterator[Console]:
    """A console of the test's own: users, hosts, no VM yet."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory:
        filled = FilledDatabase(Path(directory))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            command = [sys.executable, "-m", "tests.cloud.console.serve", filled.url, str(listener.fileno())]
            process = subprocess.Popen(command, pass_fds=[listener.fileno()])
            origin = f"http://127.0.0.1:{listener.getsockname()[1]}"  # connections wait until it accepts
        try:
            yield Console(origin, filled, process)
        finally:
            process.terminate()
            process.wait(30)
            filled.close()
