"""Commands in a VM that moves meanwhile: a pause while they have certainly not begun, and never a second time otherwise."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from spvtpm.terminal.machines import Site
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.platform import Platform
from spvtpm.terminal.remote_command import PATIENCE_S, run_in_vm
from spvtpm.wire.errors import ChannelError, UntrustedIssuer
from spvtpm.wire.messages import StopVm
from spvtpm.wire.platform_api import Destination, NewVm, Vm
from spvtpm.wire.platform_errors import CommandNotBegun
from tests.guest.running_machine import Pipe, RunningMachine
from tests.harness import RunningSp
from tests.owner import ANYTHING
from tests.relay import Cut, Side, honest
from tests.terminal.estate import new_keyring
from tests.terminal.platform_double import TOKEN, PlatformDouble

pytestmark = pytest.mark.claim("C8")

RUN = 3
"""Number of the owner's frame with `Run`: behind the introduction and what opens the channel."""


class Host(PlatformDouble):
    """A platform with one VM, whose machine a test moves itself.

    Args:
        machine: of the VM.
    """

    def __init__(self, machine: RunningMachine) -> None:
        self.machine = machine
        self.opened = threading.Semaphore(0)
        super().__init__([machine.sp])

    def destination(self, vm: Vm) -> str:
        return str(vm.chip_id)

    def move(self, vm: Vm, destination: RunningSp) -> None:  # noqa: ARG002  # as it is there
        self.moving.may_go_on.wait(PATIENCE_S)
        self.become(vm, "running")

    def console_socket(self, vm_id: uuid.UUID) -> str:  # noqa: ARG002  # as it is there
        self.opened.release()
        return str(self.machine.directory / "console.sock")


class Exec:
    """What `spvtpm vm exec` does, in this process.

    Args:
        site: of the owner.
        machine: of the VM.
    """

    def __init__(self, site: Site, machine: RunningMachine) -> None:
        self._site = site
        self.owned = OwnedVm(name="web", vm_id=machine.vm_id, vm_key=machine.key, policy=ANYTHING)
        self.pauses = 0
        self.written = b""

    def run(self, *arguments: str, given: bytes | None = None, patience_s: float = PATIENCE_S) -> int:
        with Pipe(given) as pipe:
            return run_in_vm(
                self._site,
                self.owned,
                arguments,
                self._write,
                pipe.descriptor,
                tell_waiting=self._pause,
                patience_s=patience_s,
            )

    def beside(self, *arguments: str, given: bytes | None = None) -> Future[int]:
        pool = ThreadPoolExecutor(1)
        try:
            return pool.submit(self.run, *arguments, given=given)
        finally:
            pool.shutdown(wait=False)

    def _write(self, _stream: str, data: bytes) -> None:
        self.written += data

    def _pause(self) -> None:
        self.pauses += 1


@pytest.fixture
def machine(sp: RunningSp) -> Iterator[RunningMachine]:
    """A VM that runs, without a vTPM: quick to go and to come."""
    with RunningMachine(sp, with_vtpm=False) as machine:
        machine.begin()
        yield machine


@pytest.fixture
def host(machine: RunningMachine) -> Iterator[Host]:
    with Host(machine) as host:
        yield host


@pytest.fixture
def site(host: Host, tmp_path: Path) -> Iterator[Site]:
    with Platform(Account(url=host.url, token=TOKEN), patience_s=2) as platform:
        site = Site(new_keyring(tmp_path / "keyring"), platform, timeout_s=30)
        site.run(platform.create(NewVm(vm_id=host.machine.vm_id, name="web")))
        host.become(host.vms[host.machine.vm_id], "running")
        yield site


def begin_move(site: Site, host: Host) -> None:
    """The platform says that it moves the VM, until the test lets it end."""
    host.moving.may_go_on.clear()
    site.platform.migrate(host.machine.vm_id, Destination())


def end_move(host: Host) -> None:
    """The VM runs again; at the other host, as far as anybody can see."""
    host.machine.sp.info(StopVm(vm_id=host.machine.vm_id))
    host.machine.begin()
    host.moving.may_go_on.set()


@pytest.mark.parametrize("said", ["nothing", "run"])
def test_a_command_that_comes_while_its_vm_moves_runs_there_with_all_its_input(
    site: Site, host: Host, machine: RunningMachine, said: str
) -> None:
    command = Exec(site, machine)
    given = os.urandom(300_000)

    def halt_before_run(side: Side, number: int, frame: bytes) -> list[bytes]:
        if (side, number) == ("owner", RUN):
            host.hook = honest
            machine.halt()
        return [frame]

    if said == "run":
        host.hook = halt_before_run
    else:
        machine.halt()
    begin_move(site, host)
    ran = command.beside("cat", given=given)
    assert host.opened.acquire(timeout=PATIENCE_S)
    while machine.state() != "halted":
        pass
    machine.power_off()
    assert host.opened.acquire(timeout=PATIENCE_S)  # asked for again
    end_move(host)
    assert ran.result(PATIENCE_S) == 0
    assert (command.written == given, command.pauses) == (True, 1)


@pytest.mark.attack("A16")
def test_a_command_that_was_said_is_never_said_again(site: Site, host: Host, machine: RunningMachine) -> None:
    def cut_behind_run(side: Side, number: int, frame: bytes) -> list[bytes]:
        if (side, number) == ("owner", RUN + 1):
            raise Cut
        return [frame]

    host.hook = cut_behind_run
    begin_move(site, host)
    command = Exec(site, machine)
    with pytest.raises(ChannelError):
        command.run("sh", "-c", "echo x >> ran; cat", given=b"more")
    host.moving.may_go_on.set()
    assert command.pauses == 0
    assert host.opened.acquire(blocking=False) and not host.opened.acquire(blocking=False)


def test_a_vm_that_does_not_move_is_not_waited_for(site: Site, host: Host, machine: RunningMachine) -> None:
    machine.power_off()
    command = Exec(site, machine)
    with pytest.raises(ChannelError):
        command.run("true")
    host.become(host.vms[machine.vm_id], "stopped")
    with pytest.raises(ChannelError):
        command.run("true")
    assert command.pauses == 0


def test_a_vm_that_does_not_arrive_is_waited_for_no_longer_than_that(
    site: Site, host: Host, machine: RunningMachine
) -> None:
    begin_move(site, host)
    machine.power_off()
    command = Exec(site, machine)
    with pytest.raises(ChannelError):
        command.run("true", patience_s=0.3)
    assert command.pauses == 1
    host.moving.may_go_on.set()


def test_a_vm_that_is_suspended_is_not_waited_for(site: Site, host: Host, machine: RunningMachine) -> None:
    def suspend_before_run(side: Side, number: int, frame: bytes) -> list[bytes]:
        if (side, number) == ("owner", RUN):
            host.become(host.vms[machine.vm_id], "hibernated")
            machine.suspend()
        return [frame]

    host.hook = suspend_before_run
    command = Exec(site, machine)
    with pytest.raises(CommandNotBegun):
        command.run("true")
    assert command.pauses == 0


@pytest.mark.attack("A10")
def test_who_answers_without_the_vms_key_is_not_waited_out(site: Site, host: Host, machine: RunningMachine) -> None:
    with RunningMachine(machine.sp, with_vtpm=False) as other:
        other.begin()
        host.machine = other
        host.moving.may_go_on.clear()
        site.platform.migrate(machine.vm_id, Destination())
        command = Exec(site, machine)
        with pytest.raises((UntrustedIssuer, ChannelError)):
            command.run("echo", "secret", patience_s=0.5)
        host.moving.may_go_on.set()
        assert b"secret" not in b"".join(frame for _side, frame in host.frames)
