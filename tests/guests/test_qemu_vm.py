"""An agent runs real guests under QEMU: boots, adopts, suspends, resumes and ends them, each with its vTPM."""

from __future__ import annotations

import os
import re
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from spvtpm.hypervisor.machine_process import find_machines
from spvtpm.wire.errors import DirectPathOnly, WrongState
from spvtpm.wire.platform_errors import MachineFailed
from tests.guests.direct_path import make_initramfs
from tests.guests.kernel import FIRMWARE, FIRMWARE_VARIABLES, KERNEL, Initramfs, needs_firmware, needs_guests
from tests.guests.measurements import EVENTS, SAY, Measured
from tests.harness import RunningSp
from tests.hypervisor.running_agent import PATIENCE_S, RunningAgent
from tests.owner import ANYTHING

pytestmark = needs_guests

JOB = """
for device in /dev/input/event*; do
    (head -c 24 $device >/dev/null && echo "power button" && sleep 1.5 && poweroff -f) &
done
n=0
while :; do
    n=$((n + 1))
    tpm2 pcrextend 16:sha256=$(printf %064x $n) -T device:/dev/tpmrm0 || echo "round $n failed"
    echo "round $n $(cat /sys/class/tpm/tpm0/pcr-sha256/16) $(cat /proc/sys/kernel/random/boot_id)"
    sleep 0.2
done
"""

UNTIL_POWERED_OFF = """
for device in /dev/input/event*; do
    (head -c 24 $device >/dev/null && poweroff -f) &
done
wait
"""

CONFIG = f"""
[qemu]
accelerator = "tcg"
memory_mib = 512
kernel = "{KERNEL}"
append = "console=ttyS0 quiet panic=-1"
"""


@contextmanager
def agent_with(sp: RunningSp, more: str = "") -> Iterator[RunningAgent]:
    with RunningAgent(sp, config=CONFIG + more) as running:
        (running.directory / "images").mkdir()
        yield running


@pytest.fixture
def agent(sp: RunningSp) -> Iterator[RunningAgent]:
    with agent_with(sp) as running:
        yield running


class Rounds:
    """What the guest of a VM says that it measured, round by round."""

    def __init__(self, agent: RunningAgent, vm_id: uuid.UUID) -> None:
        self._log = agent.directory / "vms" / str(vm_id) / "serial"

    def said(self) -> str:
        return self._log.read_text().replace("\r", "") if self._log.exists() else ""

    def wait_for(self, boots: int, beyond: int = 0) -> int:
        """Waits until the guest of so many boots has gone beyond a round; gives its newest round, all of them checked."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            rounds = re.findall(r"round (\d+) ([0-9A-F]{64}) (\S+)\n", self.said())
            guests = list(dict.fromkeys(guest for _number, _pcr, guest in rounds))
            newest = [int(number) for number, _pcr, guest in rounds if len(guests) == boots and guest == guests[-1]]
            if newest and newest[-1] > beyond:
                break
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)
        for boot in guests:
            pcr, expected = bytes(32), 1
            for number, value, guest in rounds:
                if guest == boot:
                    pcr = sha256(pcr + expected.to_bytes(32)).digest()
                    assert (int(number), bytes.fromhex(value)) == (expected, pcr)
                    expected += 1
        return newest[-1]


def qemu_of(agent: RunningAgent, vm_id: uuid.UUID) -> int | None:
    return find_machines("-name").get(agent.machine_directory(vm_id))


@pytest.mark.claim("B2")
def test_a_guest_is_booted_adopted_suspended_resumed_and_booted_again_when_it_falls(
    agent: RunningAgent, tmp_path: Path
) -> None:
    vm_id = agent.new_vm()
    image = make_initramfs(tmp_path / "guest", agent.sp.key(vm_id), JOB)
    image.rename(agent.directory / "images" / f"{vm_id}.initramfs")
    rounds = Rounds(agent, vm_id)
    agent.order(vm_id, "running")
    rounds.wait_for(1)
    assert "without KVM" in agent.log()

    # Another agent takes it over.
    qemu = qemu_of(agent, vm_id)
    assert qemu is not None
    agent.kill()
    agent.start()
    agent.wait_running(vm_id)
    assert qemu_of(agent, vm_id) == qemu
    reached = rounds.wait_for(1, rounds.wait_for(1))

    # It goes on in another process, with another memory of its interface, where it was: nothing is measured twice or lost.
    agent.order(vm_id, "hibernated")
    assert qemu_of(agent, vm_id) is None
    with pytest.raises(WrongState, match="stays on its host"):
        agent.ask("GET", f"/v1/vms/{vm_id}/image")
    agent.order(vm_id, "running")
    rounds.wait_for(1, reached + 2)

    # It dies, or its secure processor does, and it is booted again, with a new boot of its vTPM.
    resumed = qemu_of(agent, vm_id)
    assert resumed is not None
    os.kill(resumed, signal.SIGKILL)
    rounds.wait_for(2)
    assert "failed" not in rounds.said()
    agent.sp.kill()
    agent.sp.start()
    rounds.wait_for(3)

    agent.order(vm_id, "stopped")
    assert qemu_of(agent, vm_id) is None
    assert "power button" in rounds.said()


@pytest.mark.claim("B1")
@pytest.mark.claim("B5")
def test_a_guest_without_a_driver_of_ours_has_a_tpm_if_its_owner_allows_that(sp: RunningSp) -> None:
    with agent_with(sp, 'tpm = "emulator"\n') as agent:
        job = "echo version $(cat /sys/class/tpm/tpm0/tpm_version_major)\nsleep 1000"
        Initramfs(job).write(agent.directory / "images" / "default.initramfs")
        vm_id, forbidden = agent.new_vm(), uuid.uuid4()
        agent.order(forbidden, "defined")
        agent.provision(forbidden, msgspec.structs.replace(ANYTHING, direct_path_only=True))

        agent.order(vm_id, "running")
        with pytest.raises(DirectPathOnly):
            agent.order(forbidden, "running")
        serial = agent.directory / "vms" / str(vm_id) / "serial"
        agent.wait(vm_id, lambda _report: serial.exists() and "version 2\n" in serial.read_text())
        with pytest.raises(MachineFailed, match="QEMU refuses migrate"):
            agent.order(vm_id, "hibernated")
        assert agent.report(vm_id).machine == "running"
        agent.order(vm_id, "running")
        qemu = qemu_of(agent, vm_id)
        assert qemu is not None
        os.kill(qemu, signal.SIGKILL)
        agent.wait_running(vm_id, boots=2)


@needs_firmware
@pytest.mark.claim("B1")
def test_firmware_measures_a_guests_boot_and_keeps_variables_of_the_vm(sp: RunningSp, tmp_path: Path) -> None:
    firmware = f'tpm = "emulator"\nfirmware = "{FIRMWARE}"\nfirmware_variables = "{FIRMWARE_VARIABLES}"\n'
    with agent_with(sp, firmware) as agent:
        image = Initramfs(f". /etc/modules.sh\n{SAY}{UNTIL_POWERED_OFF}")
        image.add("etc/modules.sh", image.add_modules("button", "evdev").encode())
        image.write(agent.directory / "images" / "default.initramfs")
        vm_id = agent.new_vm()
        agent.order(vm_id, "running")
        own = agent.directory / "vms" / str(vm_id)
        serial = own / "serial"
        agent.wait(
            vm_id, lambda _report: serial.exists() and re.search(EVENTS, serial.read_text(errors="replace")) is not None
        )
        measured = Measured.of(serial.read_text().replace("\r", ""))
        replayed = measured.replayed(tmp_path / "events")
        assert replayed == {number: measured.pcrs[number] for number in replayed}
        assert 4 in replayed

        variables = own / "firmware-variables"
        assert variables.stat().st_mode & 0o777 == 0o600
        assert len(variables.read_bytes()) == FIRMWARE_VARIABLES.stat().st_size
        assert variables.read_bytes() != FIRMWARE_VARIABLES.read_bytes(), "the firmware has written there"
        agent.order(vm_id, "stopped")
        assert variables.exists()
