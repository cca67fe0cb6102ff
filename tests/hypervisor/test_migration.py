"""A VM moves from host to host while it runs: real agents, secure processors, machines, and a carrier that reads nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hypervisor.two_hosts import TwoHosts


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    """Two hosts, for the tests of this module that leave them as they were."""
    with TwoHosts() as running:
        yield running


@pytest.mark.claim("C8")
def test_a_vm_moves_with_its_memory_its_pcrs_and_its_vtpm(hosts: TwoHosts) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", "echo remembered > note; tpm2_pcrextend 16:sha256=" + "ab" * 32)
    before = hosts.a.run_in_vm(vm_id, "tpm2_pcrread", "sha256:16")

    hosts.move(vm_id)

    here, there = hosts.a.report(vm_id), hosts.b.report(vm_id)
    assert (here.machine, here.security_block, here.handoff) == ("none", None, None)
    assert there.machine == "running" and there.security_block is not None
    assert hosts.b.run_in_vm(vm_id, "cat", "note") == "remembered\n"
    assert hosts.b.run_in_vm(vm_id, "tpm2_pcrread", "sha256:16") == before
    assert hosts.a.machine_pid(vm_id) is None
