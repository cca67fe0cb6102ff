"""The pytest plugin, in a pytest run as a user has it: nothing but `spvtpm` installed, no conftest, warnings are errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.claim("B8")

USE = """
SEEN = []

def pcr(vtpm):
    return vtpm.transmit(bytes.fromhex("8001 00000014 0000017e 00000001 000b 03 000001"))[-32:]

def test_first(vtpm):
    assert pcr(vtpm) == bytes(32)
    extend = bytes.fromhex("8002 00000041 00000182 00000010 00000009 40000009 0000 00 0000 00000001 000b" + "11" * 32)
    assert vtpm.transmit(extend)[6:10] == bytes(4)
    assert pcr(vtpm) != bytes(32)
    SEEN.append(vtpm)

def test_second_has_a_fresh_one(vtpm):
    assert pcr(vtpm) == bytes(32)
    assert vtpm is not SEEN[0]

def test_the_first_ones_is_closed(vtpm):
    from spvtpm.wire.errors import WorkerError
    try:
        pcr(SEEN[0])
    except WorkerError:
        return
    raise AssertionError("it lives on")

def test_without():
    pass
"""


def run_pytest(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


def test_each_test_that_asks_gets_a_vtpm_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "test_use.py").write_text(USE)
    run = run_pytest(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "4 passed" in run.stdout


def test_the_fixture_says_what_it_is(tmp_path: Path) -> None:
    listing = run_pytest(tmp_path, "--fixtures").stdout
    assert "vtpm" in listing
    assert "A fresh vTPM in memory" in listing


def test_a_run_that_does_not_use_it_loads_nothing_for_it(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n"
        "def test_other():\n"
        "    loaded = {name for name in sys.modules if name.startswith('spvtpm')}\n"
        "    assert loaded == {'spvtpm', 'spvtpm.pytest_plugin'}\n"
    )
    run = run_pytest(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_failing_test_leaves_the_next_one_a_fresh_vtpm(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text(
        "def test_one(vtpm):\n    raise ValueError\n\n"
        "def test_two(vtpm):\n    assert vtpm.transmit(bytes.fromhex('80010000000c0000017b0008'))[6:10] == bytes(4)\n"
    )
    run = run_pytest(tmp_path)
    assert run.returncode == 1
    assert "1 failed, 1 passed" in run.stdout
