"""Machines as processes: what ends with them."""

from __future__ import annotations

import asyncio
import os
import subprocess

import pytest

from spvtpm.hypervisor.machine_process import MachineProcess
from tests.harness import has_ended, is_root

_UID = 200_007


def test_whatever_runs_as_a_machines_own_user_ends_with_it() -> None:
    """Also in another session; the next VM may get this user, and its key goes to whoever is that."""
    if not is_root():
        pytest.skip("only root can start processes of other users")

    async def end() -> None:
        machine = MachineProcess(started.pid, lambda: None, _UID)
        await machine.kill()

    script = "setsid sleep 1000 > /dev/null 2>&1 & echo $!; exec sleep 1000"
    started = subprocess.Popen(
        ["sh", "-c", script],
        stdout=subprocess.PIPE,
        user=_UID,
        group=_UID,
        extra_groups=[],
        cwd="/",
        start_new_session=True,
    )
    assert started.stdout is not None
    with started.stdout:
        left = os.pidfd_open(int(started.stdout.readline()))
    asyncio.run(end())
    started.returncode = 0  # buried

    assert has_ended(left, patience_ms=1000)
