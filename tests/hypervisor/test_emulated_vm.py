"""Machines of emulated VMs: their users, what they leave behind, whom the agent takes for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import RunningSp, is_root
from tests.hypervisor.running_agent import RunningAgent, wait_for_end

_FIRST_UID = 200_000


def _uids(pid: int) -> set[str]:
    status = Path(f"/proc/{pid}/status").read_text()
    return set(next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:])


@pytest.fixture
def agent_with_users(state_directory: Path) -> Iterator[RunningAgent]:
    """An agent whose VMs have users of their own."""
    if not is_root():
        pytest.skip("only root can start processes of other users")
    state_directory.parent.chmod(0o711)
    config = f"vm_uids = [{_FIRST_UID}, 10]\n"
    with (
        RunningSp(state_directory, config) as sp,
        RunningAgent(sp, "--vm-uids", f"{_FIRST_UID}:10") as agent,
    ):
        if "not as users of their own" in agent.log():
            pytest.skip("other users cannot reach this interpreter")
        yield agent


def test_each_vm_has_a_user_of_its_own(agent_with_users: RunningAgent) -> None:
    agent = agent_with_users
    first, second = agent.running_vm(), agent.running_vm()
    pids = [agent.machine_pid(vm_id) for vm_id in (first, second)]

    assert [_uids(pid) for pid in pids if pid is not None] == [{str(_FIRST_UID)}, {str(_FIRST_UID + 1)}]
    assert agent.run_in_vm(first, "id", "-u") == f"{_FIRST_UID}\n"
    agent.run_in_vm(first, "tpm2_pcrread", "sha256:0")
    for reached in (agent.machine_directory(second), agent.directory / "token", agent.sp.state / "nv.db"):
        assert "denied" in agent.run_in_vm(first, "sh", "-c", f"cat {reached}/* {reached} 2>&1; true")


def test_a_vm_with_a_user_of_its_own_is_hibernated_adopted_and_goes_on(agent_with_users: RunningAgent) -> None:
    agent = agent_with_users
    vm_id = agent.running_vm()
    agent.run_in_vm(vm_id, "sh", "-c", "echo remembered > note")

    agent.order(vm_id, "hibernated")
    image = agent.ask("GET", f"/v1/vms/{vm_id}/image")
    agent.ask("PUT", f"/v1/vms/{vm_id}/image", params={"sequence": "3"}, content=image)
    agent.order(vm_id, "running")
    machine = agent.machine_pid(vm_id)
    agent.kill()
    agent.start()
    agent.wait_running(vm_id)

    assert agent.machine_pid(vm_id) == machine
    assert agent.run_in_vm(vm_id, "cat", "note") == "remembered\n"


def test_a_link_that_a_vm_puts_in_place_of_its_console_leads_nowhere(agent_with_users: RunningAgent) -> None:
    """The agent may connect to more than the VM may; it does not do so for the VM."""
    agent = agent_with_users
    vm_id = agent.running_vm()
    console = agent.machine_directory(vm_id) / "console.sock"
    agent.run_in_vm(vm_id, "ln", "-sf", str(agent.sp.socket), str(console))

    with pytest.raises(Exception, match="503"), agent.websocket(f"/v1/vms/{vm_id}/console"):
        pass


def test_nothing_of_a_vm_is_left_in_clear_when_its_machine_is_killed(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    agent.run_in_vm(vm_id, "sh", "-c", "echo secret > note; sleep 1000 < /dev/null > /dev/null 2>&1 &")
    machine = agent.machine_pid(vm_id)
    assert machine is not None

    os.kill(machine, signal.SIGKILL)
    wait_for_end(machine)
    agent.order(vm_id, "stopped")

    assert not list(agent.machine_directory(vm_id).iterdir())


def test_what_a_machine_has_started_ends_with_it(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    marker = "987654"
    with agent.websocket(f"/v1/vms/{vm_id}/console"):
        command = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _LONG_COMMAND,
                str(agent.machine_directory(vm_id)),
                agent.sp.key(vm_id).hex(),
                marker,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert command.stdout is not None
        pid = int(command.stdout.readline())
        machine = agent.machine_pid(vm_id)
        assert machine is not None

        os.kill(machine, signal.SIGKILL)
        wait_for_end(pid)

        command.wait(60)
        command.stdout.close()


_LONG_COMMAND = """
import sys, uuid
from pathlib import Path
from spvtpm.terminal.console import run_command
from spvtpm.terminal.socket_relay import through_socket

machine, key, marker = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3]
write = lambda stream, data: print(data.decode(), end="", flush=True)
command = ["sh", "-c", f"echo $$; exec sleep {marker}"]
run_command(through_socket(machine / "console.sock"), key, uuid.UUID(machine.parent.name), command, write)
"""


def test_a_process_of_another_user_that_claims_to_be_a_machine_is_not_taken_for_one(agent: RunningAgent) -> None:
    if not is_root():
        pytest.skip("only root can start processes of other users")
    vm_id = agent.running_vm()
    agent.order(vm_id, "stopped")
    agent.kill()
    claim = ["sh", "-c", "sleep 1000", "machine", str(agent.machine_directory(vm_id))]
    impostor = subprocess.Popen(claim, user=65534, group=65534, extra_groups=[], start_new_session=True, cwd="/")
    agent.start()

    assert agent.order(vm_id, "running").machine == "running"
    assert impostor.poll() is None

    os.killpg(impostor.pid, signal.SIGKILL)
    impostor.wait()
