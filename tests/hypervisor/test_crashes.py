"""SIGKILL of agent, secure processor and machines: whatever was ordered is carried on with, and nothing is doubled."""

from __future__ import annotations

import os
import random
import signal
import uuid
from collections.abc import Callable, Iterator

import httpx
import pytest

from spvtpm.hypervisor.keeper import MAX_FALLS
from spvtpm.hypervisor.steps import Step
from spvtpm.wire.agent_api import VmReport
from spvtpm.wire.errors import NotRunning
from tests.harness import RunningSp
from tests.hypervisor.mortal_agent import MortalAgent
from tests.hypervisor.running_agent import RunningAgent, wait_for_end

_HURRIES = """
from spvtpm.hypervisor import keeper

keeper._FIRST_PAUSE_S = 0.01
from spvtpm.cli import main
main()
"""


@pytest.fixture
def mortal(sp: RunningSp) -> Iterator[MortalAgent]:
    with MortalAgent(sp) as running:
        yield running


def _is(state: str) -> Callable[[VmReport], bool]:
    return lambda report: report.security_block is not None and report.security_block.state == state


def test_a_machine_survives_its_agent_and_is_adopted(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    agent.run_in_vm(vm_id, "touch", "kept")
    machine = agent.machine_pid(vm_id)

    agent.kill()
    agent.start()
    report = agent.wait_running(vm_id)

    assert agent.machine_pid(vm_id) == machine
    assert report.security_block is not None and report.security_block.boots == 1
    assert "kept" in agent.run_in_vm(vm_id, "ls")
    assert agent.order(vm_id, "stopped").machine == "none"


def test_a_vm_whose_machine_dies_is_booted_again(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    machine = agent.machine_pid(vm_id)
    assert machine is not None

    os.kill(machine, signal.SIGKILL)
    agent.wait_running(vm_id, boots=2)

    assert agent.machine_pid(vm_id) not in (None, machine)
    agent.run_in_vm(vm_id, "tpm2_pcrread", "sha256:0")


def test_a_machine_that_dies_while_there_is_no_agent_is_booted_again(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    machine = agent.machine_pid(vm_id)
    assert machine is not None

    agent.kill()
    os.kill(machine, signal.SIGKILL)
    wait_for_end(machine)
    agent.start()

    agent.wait_running(vm_id, boots=2)


def test_a_vm_that_falls_again_and_again_is_given_up_until_the_next_order(mortal: MortalAgent) -> None:
    vm_id = mortal.running_vm()
    mortal.kill()
    mortal.start_program(_HURRIES)
    falls = 0

    while not mortal.report(vm_id).failure:
        pid = mortal.machine_pid(vm_id)
        if pid is not None and mortal.report(vm_id).machine == "running":
            os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
            falls += 1
    report = mortal.report(vm_id)

    assert falls == MAX_FALLS + 1
    assert "times in a row" in report.failure and report.machine == "none"
    assert mortal.order(vm_id, "running").machine == "running"


def test_a_vm_is_booted_again_when_its_secure_processor_is_back(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()

    agent.sp.kill()
    with pytest.raises(NotRunning):
        agent.report(vm_id)
    agent.sp.start()

    agent.wait_running(vm_id, boots=2)
    agent.run_in_vm(vm_id, "tpm2_pcrread", "sha256:0")


def test_an_order_given_while_the_secure_processor_is_away_is_carried_out_when_it_is_back(agent: RunningAgent) -> None:
    vm_id = agent.new_vm()

    agent.sp.kill()
    with pytest.raises(NotRunning, match="the order is kept"):
        agent.order(vm_id, "running")
    agent.sp.start()

    agent.wait_running(vm_id)


def test_what_was_announced_is_announced_again_to_another_start_of_the_secure_processor(sp: RunningSp) -> None:
    sp.stop()
    (sp.state / "sp.toml").write_text("admission_required = true\n")
    sp.start()
    with RunningAgent(sp) as agent:
        vm_id = uuid.uuid4()
        agent.order(vm_id, "defined")
        sp.kill()
        sp.start()

        agent.order(vm_id, "defined")
        agent.provision(vm_id)

        agent.order(vm_id, "running")


def test_an_agent_that_stops_in_order_powers_its_vms_off_and_boots_them_at_its_next_start(agent: RunningAgent) -> None:
    running, stopped, hibernated = agent.running_vm(), agent.running_vm(), agent.running_vm()
    agent.order(stopped, "stopped")
    agent.order(hibernated, "hibernated")

    assert agent.stop() == 0
    machines = agent.machines()
    states = {vm.vm_id: vm.state for vm in agent.sp.vms()}
    agent.start()

    assert not machines
    assert states == {running: "stopped", stopped: "stopped", hibernated: "hibernated"}
    agent.wait_running(running, boots=2)
    assert agent.report(stopped).machine == "none" and agent.report(hibernated).machine == "none"


def test_a_vm_that_is_to_go_on_is_hibernated_again_if_its_machine_does_not_come_up(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    agent.run_in_vm(vm_id, "sh", "-c", "echo remembered > note")
    agent.order(vm_id, "hibernated")
    image = agent.ask("GET", f"/v1/vms/{vm_id}/image")

    agent.ask("PUT", f"/v1/vms/{vm_id}/image", params={"sequence": "3"}, content=image[:-1] + bytes([image[-1] ^ 1]))
    with pytest.raises(Exception, match="did not come up"):
        agent.order(vm_id, "running")
    state = agent.sp.vm(vm_id).state
    agent.ask("PUT", f"/v1/vms/{vm_id}/image", params={"sequence": "4"}, content=image)
    agent.order(vm_id, "running")

    assert state == "hibernated"
    assert agent.run_in_vm(vm_id, "cat", "note") == "remembered\n"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [Step.LAUNCH, Step.BEGIN_MACHINE])
def test_a_first_boot_is_gone_on_with_wherever_the_agent_dies(mortal: MortalAgent, step: Step, when: str) -> None:
    vm_id = mortal.new_vm()
    mortal.stop()
    mortal.start_to_die(step, when)

    sequence = mortal.order_to_death(vm_id, "running")
    mortal.start()
    mortal.wait_running(vm_id)

    assert mortal.order(vm_id, "running", sequence).machine == "running"
    assert len(mortal.machines()) == 1
    mortal.run_in_vm(vm_id, "tpm2_pcrread", "sha256:0")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [Step.SUSPEND, Step.HIBERNATE, Step.END_MACHINE])
def test_a_hibernation_is_gone_on_with_wherever_the_agent_dies(mortal: MortalAgent, step: Step, when: str) -> None:
    vm_id = mortal.running_vm()
    mortal.run_in_vm(vm_id, "sh", "-c", "echo remembered > note")
    mortal.kill()
    mortal.start_to_die(step, when)

    mortal.order_to_death(vm_id, "hibernated")
    mortal.start()
    mortal.wait(vm_id, lambda report: _is("hibernated")(report) and report.machine == "none" and report.image)
    mortal.order(vm_id, "running")

    assert mortal.run_in_vm(vm_id, "cat", "note") == "remembered\n"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [Step.MARK_RESUMING, Step.START, Step.BEGIN_MACHINE, Step.FORGET_IMAGE])
def test_a_resumption_is_gone_on_with_wherever_the_agent_dies(mortal: MortalAgent, step: Step, when: str) -> None:
    vm_id = mortal.running_vm()
    mortal.run_in_vm(vm_id, "sh", "-c", "echo remembered > note")
    mortal.order(vm_id, "hibernated")
    mortal.kill()
    mortal.start_to_die(step, when)

    mortal.order_to_death(vm_id, "running")
    mortal.start()
    mortal.wait(vm_id, lambda report: report.machine == "running" and not report.image)

    assert mortal.run_in_vm(vm_id, "cat", "note") == "remembered\n"
    assert len(mortal.machines()) == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [Step.POWER_OFF, Step.STOP])
def test_a_stop_is_gone_on_with_wherever_the_agent_dies(mortal: MortalAgent, step: Step, when: str) -> None:
    vm_id = mortal.running_vm()
    mortal.kill()
    mortal.start_to_die(step, when)

    mortal.order_to_death(vm_id, "stopped")
    mortal.start()
    mortal.wait(vm_id, lambda report: _is("stopped")(report) and report.machine == "none")

    assert not mortal.machines()


@pytest.mark.parametrize("seed", range(3))
def test_vms_run_in_the_end_whoever_was_killed_meanwhile(agent: RunningAgent, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311  # to be repeated
    vms = [agent.new_vm() for _ in range(3)]
    sequences = {vm_id: agent.next_sequence() for vm_id in vms}

    for _ in range(4):
        for vm_id in vms:
            try:
                agent.order(vm_id, "running", sequences[vm_id])
            except (httpx.HTTPError, NotRunning):
                pytest.fail("nobody was killed during this order")
            victim = chance.choice(["agent", "sp", "machine", "nobody"])
            if victim == "agent":
                agent.kill()
                agent.start()
            elif victim == "sp":
                agent.sp.kill()
                agent.sp.start()
            elif victim == "machine" and (pid := agent.machine_pid(vm_id)) is not None:
                os.kill(pid, signal.SIGKILL)
                wait_for_end(pid)

    for vm_id in vms:
        agent.order(vm_id, "running", sequences[vm_id])
        agent.wait_running(vm_id)
        agent.run_in_vm(vm_id, "tpm2_pcrread", "sha256:0")
    assert len(agent.machines()) == len(vms)
