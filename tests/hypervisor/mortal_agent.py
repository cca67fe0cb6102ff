"""A real agent that dies by SIGKILL at a step that a test names."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid

import httpx
import pytest

from spvtpm.hypervisor.steps import Step
from spvtpm.wire.agent_api import WantedState
from tests.hypervisor.running_agent import RunningAgent

_DIES_AT = """
import os, signal
from spvtpm.hypervisor import performer

carry_out = performer.Performer.perform

async def perform(self, step, record):
    if (step.name, "before") == {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    record = await carry_out(self, step, record)
    if (step.name, "after") == {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    return record

performer.Performer.perform = perform
from spvtpm.cli import main
main()
"""


class MortalAgent(RunningAgent):
    """An agent that can be told at which step to die."""

    def start_to_die(self, step: Step, when: str) -> None:
        """Starts one that dies by SIGKILL right before or after the first such step."""
        self.start_program(_DIES_AT.format(when=repr((step.name, when))))

    def start_program(self, program: str) -> None:
        """Starts it changed."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, "agent", "run", str(self.directory)], stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(b"listening")
        self.http.close()
        self.http = self.client(self.token)

    def order_to_death(self, vm_id: uuid.UUID, want: WantedState) -> int:
        """An order on which it dies; its number."""
        sequence = self.next_sequence()
        with pytest.raises(httpx.HTTPError):
            self.order(vm_id, want, sequence)
        assert self.process is not None
        assert self.process.wait(60) == -signal.SIGKILL
        self._reap()
        return sequence
