"""SIGKILL of agents and secure processors at each step of a move: by asking and telling again, exactly one host has the VM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from spvtpm.hypervisor.steps import Step
from spvtpm.wire.agent_api import HandoffReport, VmReport
from spvtpm.wire.errors import NotRunning
from spvtpm.wire.platform_errors import Unavailable
from tests.harness import RunningSp
from tests.hypervisor.mortal_agent import MortalAgent
from tests.hypervisor.running_agent import PATIENCE_S, wait_for_end
from tests.hypervisor.two_hosts import Carrying, TwoHosts, handoff_of
from tests.processor.migration.two_chips import Cut, Hook, Side, honest

_Result = TypeVar("_Result")
_NV = "0x1500016"
_REMEMBER = f"tpm2_nvdefine -C o -s 8 {_NV} && printf 12345678 | tpm2_nvwrite -C o -i - {_NV}"


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as running:
        yield running


class Persistent:
    """A platform that asks and tells until it is answered; what has died it starts again.

    Args:
        hosts: its hosts.
        vm_id: a VM that runs at the first.
    """

    def __init__(self, hosts: TwoHosts, vm_id: uuid.UUID) -> None:
        self._hosts, self._vm_id = hosts, vm_id
        self.deaths = 0
        self._numbers = [hosts.a.next_sequence() for _number in range(3)]
        for number in self._numbers:
            while hosts.b.next_sequence() < number:
                pass

    def begin(self) -> str:
        """Both are ordered; the handoff's name."""
        first, vm_id = self._numbers[0], self._vm_id
        name = handoff_of(self._again(lambda: self._hosts.a.order(vm_id, "departing", first))).handoff
        self._again(lambda: self._hosts.b.order(vm_id, "arriving", first, handoff=name))
        return name

    def carry(self, name: str, hook: Hook = honest) -> None:
        """A link, if there is still something to carry."""
        try:
            Carrying(self._hosts.a, self._hosts.b, self._vm_id, name, hook).wait()
        except (InvalidStatus, ConnectionClosed, OSError):
            self.revive()

    def decided(self) -> HandoffReport:
        """What became of it at the source."""

        def ask() -> HandoffReport:
            report = handoff_of(self._hosts.a.report(self._vm_id))
            if report.outcome == "open":
                raise Unavailable("it is open still")
            return report

        return self._again(ask)

    def end(self) -> HandoffReport:
        """Both are told what became of it."""
        decided, vm_id, (_first, second, third) = self.decided(), self._vm_id, self._numbers
        a, b, name, token = self._hosts.a, self._hosts.b, decided.handoff, decided.token
        if decided.outcome == "kept":
            self._again(lambda: b.order(vm_id, "absent", third, handoff=name, token=token))
            self._again(lambda: a.order(vm_id, "running", third))
            return decided
        report = self._again(lambda: b.order(vm_id, "running", second, handoff=name, token=token))
        receipt = handoff_of(report).token
        self._again(lambda: a.order(vm_id, "absent", second, handoff=name, token=receipt))
        return decided

    def _again(self, doing: Callable[[], _Result]) -> _Result:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.revive()
            try:
                return doing()
            except (httpx.TransportError, NotRunning, Unavailable) as error:
                assert time.monotonic() < deadline, error
                time.sleep(0.05)

    def revive(self) -> None:
        """Starts again what has died."""
        for agent in (self._hosts.a, self._hosts.b):
            for process in (agent.sp, agent):
                self.deaths += _start_again(process)


def _start_again(process: RunningSp | MortalAgent) -> bool:
    child: subprocess.Popen[bytes] | None = process.process
    if child is None or child.poll() is None:
        return False
    process._reap()
    process.start()
    return True


def _exactly_one(hosts: TwoHosts, vm_id: uuid.UUID, decided: HandoffReport) -> VmReport:
    """It runs where it was decided, with its vTPM, and nothing of it is at the other host."""
    has, has_not = (hosts.b, hosts.a) if decided.outcome == "gone" else (hosts.a, hosts.b)
    report = has.wait_running(vm_id)
    assert "12345678" in has.run_in_vm(vm_id, "tpm2_nvread", "-C", "o", _NV)
    assert has_not.report(vm_id).security_block is None and has_not.machine_pid(vm_id) is None
    return report


@pytest.mark.claim("C8")
@pytest.mark.attack("A19")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("side", "step"),
    [
        ("source", Step.SEND_START),
        ("source", Step.MOVE),
        ("source", Step.POWER_OFF),
        ("source", Step.FORGET_HANDOFF),
        ("source", Step.REMOVE),
        ("destination", Step.RECEIVE_START),
        ("destination", Step.KEEP_MEMORY),
        ("destination", Step.RECEIVE_FINISH),
        ("destination", Step.BEGIN_MACHINE),
    ],
    ids=lambda value: value.name if isinstance(value, Step) else value,
)
def test_an_agent_that_dies_at_a_step_of_a_move(hosts: TwoHosts, side: Side, step: Step, when: str) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    mortal = hosts.a if side == "source" else hosts.b
    mortal.kill()
    mortal.start_to_die(step, when)
    platform = Persistent(hosts, vm_id)

    platform.carry(platform.begin())
    decided = platform.end()

    assert platform.deaths == 1
    _exactly_one(hosts, vm_id, decided)
    assert decided.outcome == "gone" or step in (Step.SEND_START, Step.MOVE, Step.RECEIVE_START)
    hosts.destroy(vm_id)


@pytest.mark.attack("A19")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("side", "step"), [("source", Step.SETTLE), ("source", Step.GO_ON), ("destination", Step.RECEIVE_CANCEL)]
)
def test_an_agent_that_dies_while_a_move_is_taken_back(hosts: TwoHosts, side: Side, step: Step, when: str) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    mortal = hosts.a if side == "source" else hosts.b
    mortal.kill()
    mortal.start_to_die(step, when)
    platform = Persistent(hosts, vm_id)

    platform.carry(platform.begin(), _ends_at("destination", 2))  # prepared: so the machine is halted
    decided = platform.end()

    assert platform.deaths == 1
    report = _exactly_one(hosts, vm_id, decided)
    assert report.security_block is not None and report.security_block.boots == 1
    hosts.destroy(vm_id)


def _ends_at(side: Side, number: int, kill: Callable[[], None] = lambda: None) -> Hook:
    def hook(of: Side, at: int, frame: bytes) -> list[bytes]:
        if (of, at) == (side, number):
            kill()
            raise Cut
        return [frame]

    return hook


@pytest.mark.claim("C8")
@pytest.mark.attack("A19")
@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize(("side", "number"), [("source", 0), ("source", 4), ("destination", 1), ("destination", 2)])
def test_a_secure_processor_that_dies_in_the_middle_of_a_move(
    hosts: TwoHosts, victim: Side, side: Side, number: int
) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    sp = (hosts.a if victim == "source" else hosts.b).sp
    platform = Persistent(hosts, vm_id)

    def kill() -> None:
        sp.process.kill()
        sp.process.wait()

    platform.carry(platform.begin(), _ends_at(side, number, kill))
    decided = platform.end()

    assert platform.deaths == 1
    _exactly_one(hosts, vm_id, decided)
    hosts.destroy(vm_id)


@pytest.mark.claim("C8")
@pytest.mark.attack("A19")
@pytest.mark.parametrize("victims", ["a", "b", "ab"])
def test_hosts_that_die_between_commit_and_receipt(hosts: TwoHosts, victims: str) -> None:
    """Agent and secure processor at once, as a host does that loses its power."""
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    platform = Persistent(hosts, vm_id)
    platform.carry(platform.begin())
    assert platform.decided().outcome == "gone"

    for name in victims:
        agent: MortalAgent = getattr(hosts, name)
        agent.kill()
        agent.sp.kill()
        agent.sp.start()
        agent.start()
    decided = platform.end()

    assert decided.outcome == "gone"
    _exactly_one(hosts, vm_id, decided)
    hosts.destroy(vm_id)


@pytest.mark.attack("A19")
@pytest.mark.parametrize("is_linked", [False, True])
def test_an_agent_that_is_stopped_in_order_takes_a_move_back(hosts: TwoHosts, is_linked: bool) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    platform = Persistent(hosts, vm_id)
    name = platform.begin()
    if is_linked:

        def stop(of: Side, at: int, frame: bytes) -> list[bytes]:
            if (of, at) == ("source", 3) and hosts.a.is_running:
                hosts.a.stop()
            return [frame]

        platform.carry(name, stop)
    else:
        hosts.a.stop()
    hosts.a.start()
    decided = platform.end()

    assert decided.outcome == "kept"
    _exactly_one(hosts, vm_id, decided)
    hosts.destroy(vm_id)


@pytest.mark.attack("A19")
def test_a_machine_that_dies_in_the_middle_of_a_move_is_booted_where_it_was(hosts: TwoHosts) -> None:
    vm_id = hosts.running_vm()
    hosts.a.run_in_vm(vm_id, "sh", "-c", _REMEMBER)
    machine = hosts.a.machine_pid(vm_id)
    assert machine is not None
    platform = Persistent(hosts, vm_id)

    def kill() -> None:
        os.kill(machine, signal.SIGKILL)
        wait_for_end(machine)

    platform.carry(platform.begin(), _ends_at("destination", 1, kill))
    decided = platform.end()

    report = _exactly_one(hosts, vm_id, decided)
    assert decided.outcome == "kept" and report.security_block is not None and report.security_block.boots == 2
    hosts.destroy(vm_id)
