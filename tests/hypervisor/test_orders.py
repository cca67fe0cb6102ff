"""A VM's whole life on a host, as a platform orders it."""

from __future__ import annotations

import uuid

import pytest

from spvtpm.wire.errors import NotFound, TooMany, WrongState
from spvtpm.wire.owner_messages import DestroyVm, Done
from spvtpm.wire.platform_errors import Superseded
from tests.hypervisor.running_agent import RunningAgent


@pytest.mark.claim("C3")
def test_a_vm_is_announced_provisioned_and_booted_with_its_vtpm(agent: RunningAgent) -> None:
    vm_id = uuid.uuid4()

    defined = agent.order(vm_id, "defined")
    agent.provision(vm_id)
    running = agent.order(vm_id, "running")

    assert (defined.want, defined.machine, defined.security_block) == ("defined", "none", None)
    assert running.machine == "running" and not running.failure
    assert running.security_block is not None and running.security_block.state == "running"
    assert "sha256" in agent.run_in_vm(vm_id, "tpm2_pcrread", "sha256:0")


def test_a_vm_that_is_stopped_has_no_machine_and_boots_again(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    agent.run_in_vm(vm_id, "touch", "forgotten")

    stopped = agent.order(vm_id, "stopped")
    machine_after_stop = agent.machine_pid(vm_id)
    left = list(agent.machine_directory(vm_id).iterdir())
    running = agent.order(vm_id, "running")

    assert stopped.machine == "none" and machine_after_stop is None and not left
    assert stopped.security_block is not None and stopped.security_block.state == "stopped"
    assert running.machine == "running"
    assert running.security_block is not None and running.security_block.boots == 2
    assert "forgotten" not in agent.run_in_vm(vm_id, "ls")


def test_a_hibernated_vm_goes_on_with_its_memory_and_its_pcrs(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    agent.run_in_vm(vm_id, "sh", "-c", "echo remembered > note")
    agent.run_in_vm(vm_id, "tpm2_pcrextend", "16:sha256=" + "ab" * 32)
    before = agent.run_in_vm(vm_id, "tpm2_pcrread", "sha256:16")

    hibernated = agent.order(vm_id, "hibernated")
    resumed = agent.order(vm_id, "running")

    assert hibernated.machine == "none" and hibernated.image
    assert hibernated.security_block is not None and hibernated.security_block.state == "hibernated"
    assert resumed.machine == "running" and not resumed.image
    assert agent.run_in_vm(vm_id, "cat", "note") == "remembered\n"
    assert agent.run_in_vm(vm_id, "tpm2_pcrread", "sha256:16") == before


def test_an_image_is_given_to_whoever_asks_with_the_token_and_taken_back(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    agent.run_in_vm(vm_id, "sh", "-c", "echo remembered > note")
    agent.order(vm_id, "hibernated")
    image = agent.ask("GET", f"/v1/vms/{vm_id}/image")
    (agent.machine_directory(vm_id) / "image").unlink()

    agent.ask("PUT", f"/v1/vms/{vm_id}/image", params={"sequence": "3"}, content=image)
    agent.order(vm_id, "running")

    assert b"remembered" not in image
    assert agent.run_in_vm(vm_id, "cat", "note") == "remembered\n"


def test_an_image_for_a_vm_that_runs_is_refused(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()

    with pytest.raises(WrongState, match="ordered to run"):
        agent.ask("PUT", f"/v1/vms/{vm_id}/image", params={"sequence": "9"}, content=b"image")

    with pytest.raises(NotFound):
        agent.ask("GET", f"/v1/vms/{vm_id}/image")


def test_an_image_may_come_before_the_first_order_and_not_after_a_newer_one(agent: RunningAgent) -> None:
    vm_id = uuid.uuid4()

    agent.ask("PUT", f"/v1/vms/{vm_id}/image", params={"sequence": "5"}, content=b"image")
    defined = agent.order(vm_id, "defined", 6)

    assert defined.image
    with pytest.raises(Superseded):
        agent.ask("PUT", f"/v1/vms/{vm_id}/image", params={"sequence": "5"}, content=b"other")
    assert agent.order(vm_id, "absent", 7).image is False


def test_an_order_is_idempotent_and_an_older_one_refused(agent: RunningAgent) -> None:
    vm_id = agent.new_vm()

    agent.order(vm_id, "running", 5)
    again = agent.order(vm_id, "running", 5)

    assert again.security_block is not None and again.security_block.boots == 1
    with pytest.raises(Superseded):
        agent.order(vm_id, "stopped", 4)
    with pytest.raises(Superseded, match="was to be running"):
        agent.order(vm_id, "stopped", 5)
    assert agent.report(vm_id).machine == "running"


def test_a_vm_is_absent_once_its_owner_has_destroyed_it_and_not_before(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()
    agent.order(vm_id, "stopped")

    with pytest.raises(WrongState, match="has not taken or destroyed"):
        agent.order(vm_id, "absent")
    with agent.sp.channel() as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)
    gone = agent.order(vm_id, "absent", 10)

    assert gone.security_block is None and gone.want == "absent"
    assert not agent.machine_directory(vm_id).parent.exists()
    assert vm_id not in agent.reports()
    with pytest.raises(Superseded):
        agent.order(vm_id, "running", 9)


def test_a_vm_whose_owner_destroys_it_while_it_runs_loses_its_machine(agent: RunningAgent) -> None:
    vm_id = agent.running_vm()

    with agent.sp.channel() as channel:
        channel.ask(DestroyVm(vm_id=vm_id), Done)
    report = agent.wait(vm_id, lambda report: bool(report.failure))

    assert report.machine == "none" and "provisioned" in report.failure
    assert agent.order(vm_id, "absent").security_block is None


def test_a_vm_that_nobody_has_provisioned_cannot_run(agent: RunningAgent) -> None:
    vm_id = uuid.uuid4()
    agent.order(vm_id, "defined")

    with pytest.raises(NotFound, match="not provisioned"):
        agent.order(vm_id, "running")

    assert "not provisioned" in agent.report(vm_id).failure


def test_a_vm_that_does_not_run_cannot_be_hibernated(agent: RunningAgent) -> None:
    vm_id = agent.new_vm()

    with pytest.raises(WrongState, match="does not run"):
        agent.order(vm_id, "hibernated")


def test_a_vm_whose_owner_does_not_have_its_key_injected_is_stopped_again(agent: RunningAgent) -> None:
    vm_id = agent.sp.new_vm()

    with pytest.raises(WrongState, match="does not get its key"):
        agent.order(vm_id, "running")

    assert agent.sp.vm(vm_id).state == "stopped"


def test_the_host_says_what_it_is_and_what_the_chip_shows(agent: RunningAgent) -> None:
    agent.running_vm()

    host = agent.host()

    assert host.vms == 1 and host.active == 1
    with agent.sp.channel() as channel:
        assert host.papers == channel.papers


def test_a_host_takes_so_many_vms(agent: RunningAgent) -> None:
    agent.stop()
    config = agent.directory / "agent.toml"
    config.write_text(config.read_text() + "max_vms = 1\n")
    agent.start()
    agent.new_vm()

    with pytest.raises(TooMany):
        agent.order(uuid.uuid4(), "defined")
    assert agent.host().max_vms == 1
