"""Two hosts, each in a network of its own, and the platform between them: VMs move through cables that are cut in the middle."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from spvtpm.cloud.agents import Agent
from spvtpm.hypervisor.machine_process import find_machines
from spvtpm.terminal.keyring import Keyring
from tests.cloud_stack import CloudStack
from tests.networks import Network, NoNetworks
from tests.processor.processes import wait_until

_PORT = 7411
_CUT_S = 4
_PATIENCE_S = 120


class Apart:
    """A platform, and two hosts in networks of their own.

    Args:
        directory: of all of it; does not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self._name, self._known = "", b""
        with ExitStack() as cleanup:
            self._make(directory, cleanup)
            self._cleanup = cleanup.pop_all()

    def _make(self, directory: Path, cleanup: ExitStack) -> None:
        self.networks = [cleanup.enter_context(Network(number)) for number in (1, 2)]
        self.cloud = cleanup.enter_context(CloudStack(directory, hosts=0))
        for network in self.networks:
            with network.entered():
                self.cloud.add_host("--listen", f"{network.address}:{_PORT}")
        host = self.cloud.hosts[0]
        self._source = Agent(host.name, host.address, host.token_file.read_text())
        cleanup.callback(self._source.close)
        self.alice = self.cloud.user("alice")
        wait_until(lambda: self.alice.run("chips").count(b"host-") >= 2)

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_error: object) -> None:
        for network in self.networks:
            network.mend()
        self._cleanup.close()

    def new_vm(self) -> None:
        """A VM at the first host with much memory; the one before is gone."""
        if self._name:
            self.alice.run("vm", "destroy", self._name, "--yes")
        self._name = f"vm-{uuid.uuid4().hex[:8]}"
        self.alice.run("vm", "create", self._name, "--host", "host-0")
        script = "echo known > note; tpm2_pcrextend 16:sha256=$(printf %064d 1); head -c 12000000 /dev/urandom > much"
        self.alice.run("vm", "exec", self._name, "--", "sh", "-c", script)
        self._known = self.recall()

    def recall(self) -> bytes:
        """What it knows."""
        return self.alice.run("vm", "exec", self._name, "--", "sh", "-c", "cat note; tpm2_pcrread sha256:16")

    def migrate(self) -> subprocess.Popen[bytes]:
        """It begins to move to the second host, at its owner's terminal."""
        return self.alice.begin("vm", "migrate", self._name, "--to", "host-1")

    def await_copied(self, count: int) -> None:
        """Until so many bytes of its memory have left the first host, or all that there was."""
        vm_id = self._vm_id()

        def is_copied() -> bool:
            handoff = self._source.vm_report(vm_id).handoff
            return handoff is not None and (handoff.copied_bytes >= count or handoff.outcome != "open")

        wait_until(is_copied)

    def runs_at(self) -> list[str]:
        """The hosts where a machine of it runs."""
        machines = find_machines("machine")
        directories = {
            host.name: host.agent_state / "vms" / str(self._vm_id()) / "machine" for host in self.cloud.hosts
        }
        return [name for name, directory in directories.items() if directory in machines]

    def is_at_one_host(self) -> None:
        """It runs there as it did, and in the end nothing of it is at the other one."""
        assert self.recall() == self._known
        wait_until(lambda: len(self.runs_at()) == 1)
        wait_until(lambda: sum(self._vm_id() in {vm.vm_id for vm in host.sp.vms()} for host in self.cloud.hosts) == 1)

    def _vm_id(self) -> uuid.UUID:
        return Keyring.open(self.alice.keyring, bytes).owned(self._name).vm_id


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with tempfile.TemporaryDirectory(prefix="spvtpm-", ignore_cleanup_errors=True) as parent:
        Path(parent).chmod(0o711)
        try:
            made = Apart(Path(parent) / "c")
        except NoNetworks as why:
            pytest.skip(f"no networks can be made here: {why}")
        with made:
            yield made


@pytest.mark.claim("C8")
@pytest.mark.attack("A19")
@pytest.mark.parametrize("cut", ["source", "destination"])
def test_a_cable_that_is_cut_for_a_while_delays_a_move(apart: Apart, cut: str) -> None:
    """At the end of its memory, where the vTPM follows: the VM is at one host then, as it was."""
    apart.new_vm()
    move = apart.migrate()
    apart.await_copied(12_000_000)
    cable = apart.networks[0 if cut == "source" else 1]

    cable.cut()
    with pytest.raises(subprocess.TimeoutExpired):
        move.wait(_CUT_S)
    cable.mend()
    said, _none = move.communicate(timeout=_PATIENCE_S)

    apart.is_at_one_host()
    assert (move.returncode == 0) == (apart.runs_at() == ["host-1"]), said.decode()


@pytest.mark.claim("C8")
@pytest.mark.attack("A19")
def test_who_does_not_want_to_wait_for_a_cut_cable_has_his_vm_where_it_was(apart: Apart) -> None:
    apart.new_vm()
    move = apart.migrate()
    apart.await_copied(1)

    apart.networks[1].cut()
    move.send_signal(signal.SIGINT)
    said, _none = move.communicate(timeout=_PATIENCE_S)
    assert move.returncode == 130, said.decode()
    assert apart.runs_at() == ["host-0"]
    apart.recall()

    apart.networks[1].mend()
    again = apart.migrate()
    said, _none = again.communicate(timeout=_PATIENCE_S)
    assert again.returncode == 0, said.decode()
    apart.is_at_one_host()
    assert apart.runs_at() == ["host-1"]
