"""The main job, as a user starts it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = (sys.executable, "-m", "spvtpm.demo")
CLAIMS = ("C1, C2", "C9", "B4", "B6", "C6c", "C4", "C7", "C6a, C6b", "C4, B3", "C1 to C6")


def leftovers() -> set[Path]:
    return set(Path("/tmp").glob("spvtpm-demo-*"))


@pytest.mark.claim("C1")
@pytest.mark.claim("C2")
@pytest.mark.claim("C9")
@pytest.mark.claim("C4")
@pytest.mark.claim("C6a")
@pytest.mark.claim("C6b")
@pytest.mark.claim("C7")
@pytest.mark.claim("C8")
def test_the_demo_shows_every_claim_and_leaves_nothing_behind() -> None:
    before = leftovers()
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    table = done.stdout.partition("What was shown")[2]

    assert "FAILED" not in table
    assert table.count(" ok ") == 18
    assert "18 of 18 claims shown" in table
    for claim in CLAIMS:
        assert f" {claim} " in table
    assert "✗" not in done.stdout
    assert leftovers() <= before


def test_the_demo_names_the_debian_package_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "openssl").symlink_to(shutil.which("openssl") or "/usr/bin/openssl")
    done = subprocess.run(DEMO, capture_output=True, text=True, env={**os.environ, "PATH": str(tmp_path)})

    assert done.returncode == 4
    assert "sudo apt-get install tpm2-tools" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_fails_with_its_table_when_a_tool_misbehaves(tmp_path: Path) -> None:
    broken = tmp_path / "tpm2_pcrread"  # as the host has it; a VM has its own
    broken.write_text("#!/bin/sh\necho something else\n")
    broken.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(DEMO, capture_output=True, text=True, env=environment, timeout=400)

    assert done.returncode == 1
    assert "✗ the attack works there: the PCR has changed" in done.stdout
    assert "FAILED" in done.stdout.partition("What was shown")[2]
    assert "Traceback" not in done.stderr


def test_the_demo_that_breaks_off_says_what_was_not_shown(tmp_path: Path) -> None:
    broken = tmp_path / "tpm2_nvdefine"
    broken.write_text("#!/bin/sh\necho 'ERROR: no ink' >&2; exit 1\n")
    broken.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(DEMO, capture_output=True, text=True, env=environment, timeout=400)

    assert done.returncode == 1
    assert "tpm2_nvdefine on the plain vTPM: ERROR: no ink" in done.stdout
    assert "the story broke off" in done.stdout.partition("What was shown")[2]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(number: signal.Signals) -> None:
    before = leftovers()
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "tpm2_create " in line:
                break
        made = leftovers() - before
        demo.send_signal(number)
        _output, errors = demo.communicate(timeout=60)

    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert made
    deadline = time.monotonic() + 30
    while processes_that_name(made):
        assert time.monotonic() < deadline, processes_that_name(made)
        time.sleep(0.05)
    assert not any(directory.exists() for directory in made)


def processes_that_name(directories: set[Path]) -> list[str]:
    """Command lines in which one of the directories stands."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if any(str(directory) in line for directory in directories):
                found.append(line)
    return found
