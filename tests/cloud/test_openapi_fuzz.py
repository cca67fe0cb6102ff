"""The API keeps to its own description, whatever is sent: schemathesis finds nothing. Seeded: the same each time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from spvtpm.wire import platform_api
from tests.cloud.served import REPORT, ServedPlatform

EXAMPLES = 10
SEED = 20_260_101
RELAYS = "/(channel|console)$"
"""WebSockets are no requests that schemathesis could make; test_relay.py does."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedPlatform]:
    """A replica that one host is known to."""
    with ServedPlatform(tmp_path / "p", listen="127.0.0.1:0") as running:
        running.add_host("h1", "http://127.0.0.1:1", REPORT)
        yield running


@pytest.mark.attack("A25")
def test_schemathesis_finds_nothing(served: ServedPlatform, tmp_path: Path) -> None:
    token = served.token("fuzz", "vms", "admin")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json"),
        *("--header", f"Authorization: Bearer {token}", "--exclude-path-regex", RELAYS),
        *("--checks", "all", "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", str(EXAMPLES), "--seed", str(SEED), "--no-shrink", "--suppress-health-check", "all"),
        *("--generation-database", "none", "--no-color"),
    ]
    environment = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path / "hypothesis")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1]) > 500
    assert "Traceback" not in served.log()


def test_every_route_is_described_and_nothing_else(served: ServedPlatform) -> None:
    with httpx.Client(base_url=served.address) as client:
        paths = client.get("/openapi.json").json()["paths"]
        described = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert described == set(re.findall(r"(?m)^ +(GET|POST|PUT|DELETE) +(/v1/[^ ?]*)", platform_api.__doc__ or "")) | {
        ("GET", path) for path in ("/healthz", "/readyz", "/openapi.json")
    }
