"""The driver of emulated VMs carries a VM's memory from one machine to another, and can read none of it."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spvtpm.hypervisor.emulated_vm import EmulatedVm
from spvtpm.hypervisor.virtual_machine import Boot, VirtualMachine
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.terminal.console import run_command
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire.errors import SpvtpmError, WrongState
from spvtpm.wire.launch_secret import ComingMemory
from spvtpm.wire.memory_records import NewestRecords, PageLedger, parse_record
from spvtpm.wire.memory_stream import verify_final
from spvtpm.wire.messages import HibernateVm, LaunchVm, StartVm, VmInfo
from spvtpm.wire.owner_messages import MyVm
from spvtpm.wire.platform_errors import MachineFailed, MemoryStreamDamaged
from tests.guest.bound_secret import bound_secret
from tests.harness import RunningSp

HANDOFF, STOP = os.urandom(16), os.urandom(32)
EXTEND = "tpm2_pcrextend 16:sha1=$(printf %040d 1)"


class Hosts:
    """Two hosts' drivers of one VM, over one secure processor: there, hibernation stands for the vTPM's own way.

    Args:
        sp: of both.
    """

    def __init__(self, sp: RunningSp) -> None:
        self.sp = sp
        self.vm_id = uuid.uuid4()
        self.root = sp.state.with_name("hosts")
        with sp.channel() as channel:
            channel.ask(sp.owner.provision(self.vm_id, sp.key(self.vm_id), inject_key=True), MyVm)

    def vm(self, host: str, left: int | None = None) -> EmulatedVm:
        """The VM at a host; of a machine that an agent which has died has left, if any."""
        vms = self.root / host
        vms.mkdir(parents=True, exist_ok=True)
        return EmulatedVm(self.vm_id, vms / str(self.vm_id), VmUsers(vms, None), lambda: None, left)

    def boot(self, info: VmInfo, handoff: bytes | None = None) -> Boot:
        """What a machine needs to take part in a boot; with memory that came in a handoff, if one is given."""
        assert info.vtpm is not None and info.vtpm.interface and info.launch_secret
        secret = Path(info.launch_secret)
        if handoff is not None:
            secret = bound_secret(secret, self.root / "secret.sock", ComingMemory(handoff, STOP))
        return Boot(info.boots, Path(info.vtpm.interface), secret, handoff is not None)

    async def running(self, host: str) -> EmulatedVm:
        """The VM, in its first boot."""
        vm = self.vm(host)
        await vm.start(self.boot(self.sp.info(LaunchVm(vm_id=self.vm_id))))
        return vm

    async def resume(self, vm: EmulatedVm, handoff: bytes = HANDOFF) -> None:
        """Goes on, in the boot that it was in."""
        await vm.start(self.boot(self.sp.info(StartVm(vm_id=self.vm_id)), handoff))

    async def shell(self, vm: VirtualMachine, script: str) -> str:
        """What a script in it prints."""
        written = list[bytes]()
        way = through_socket(vm.console().path)
        command = ["sh", "-c", script]
        key = self.sp.key(self.vm_id)
        code = await asyncio.to_thread(
            run_command, way, key, self.vm_id, command, lambda _, data: written.append(data), None, 60.0
        )
        assert code == 0, written
        return b"".join(written).decode()


@pytest.fixture
def hosts(sp: RunningSp) -> Hosts:
    """Two hosts, and a VM that has been provisioned."""
    return Hosts(sp)


@contextmanager
def no_machine_left(*vms: EmulatedVm) -> Iterator[None]:
    """Whatever happens to the test."""
    try:
        yield
    finally:
        for pid in [vm.pid for vm in vms]:
            if pid is not None:
                os.kill(pid, 9)


async def gathered(records: AsyncIterator[bytes]) -> list[bytes]:
    return [record async for record in records]


def test_a_running_vm_moves_from_host_to_host(hosts: Hosts) -> None:
    async def move() -> None:
        source, destination = await hosts.running("a"), hosts.vm("b")
        with no_machine_left(source, destination):
            await hosts.shell(source, f"head -c 100000 /dev/urandom > much; echo 1 > note; {EXTEND}")
            records = await gathered(source.copy_memory(HANDOFF))
            await hosts.shell(source, "echo 2 > note")
            again = await gathered(source.copy_memory(HANDOFF))
            assert 0 < len(again) < len(records)
            known = await hosts.shell(source, "echo 3 > note; sha1sum much note; tpm2_pcrread sha1:16")
            assert source.state == "running"

            await source.halt()
            assert source.console().pid == source.pid  # those who come wait there
            hosts.sp.info(HibernateVm(vm_id=hosts.vm_id))
            records += again + await gathered(source.finish_copy(HANDOFF, STOP))
            ledger = PageLedger()
            for record in records[:-1]:
                ledger.take(parse_record(record))
            verify_final(hosts.sp.key(hosts.vm_id), HANDOFF, STOP, ledger, records[-1])
            await source.stop()
            assert source.pid is None

            await destination.put_memory(newest(records))
            await hosts.resume(destination)
            assert destination.state == "running"
            assert await hosts.shell(destination, "sha1sum much note; tpm2_pcrread sha1:16") == known
            await destination.stop()

    asyncio.run(move())


def test_a_halted_vm_goes_on_and_can_move_later(hosts: Hosts) -> None:
    async def move() -> None:
        source, destination = await hosts.running("a"), hosts.vm("b")
        with no_machine_left(source, destination):
            await gathered(source.copy_memory(HANDOFF))
            await source.halt()
            early = await gathered(source.finish_copy(HANDOFF, STOP))
            assert len(early) == 1
            await source.go_on()
            assert source.state == "running"
            await hosts.shell(source, "tpm2_getrandom 4 > random; echo on > note")
            with pytest.raises(WrongState, match="finished"):
                await gathered(source.copy_memory(HANDOFF))

            records = await gathered(source.copy_memory(b"x" * 16))
            await source.halt()
            hosts.sp.info(HibernateVm(vm_id=hosts.vm_id))
            records += await gathered(source.finish_copy(b"x" * 16, STOP))
            await source.stop()
            await destination.put_memory(newest(records))
            await hosts.resume(destination, b"x" * 16)
            assert await hosts.shell(destination, "cat note") == "on\n"
            await destination.stop()

    asyncio.run(move())


def test_a_halted_machine_is_adopted_as_such(hosts: Hosts) -> None:
    async def move() -> None:
        source = await hosts.running("a")
        with no_machine_left(source):
            await source.halt()
            after_death = hosts.vm("a", left=source.pid)
            await after_death.adopt()
            assert after_death.state == "halted"
            assert await gathered(after_death.copy_memory(HANDOFF))
            await after_death.go_on()
            assert await hosts.shell(after_death, "echo on") == "on\n"
            await after_death.stop()

    asyncio.run(move())


@pytest.mark.attack("A18")
def test_memory_that_is_not_the_last_word_does_not_come_up_and_is_kept(hosts: Hosts) -> None:
    async def move() -> None:
        source, destination = await hosts.running("a"), hosts.vm("b")
        with no_machine_left(source, destination):
            first = await gathered(source.copy_memory(HANDOFF))
            await hosts.shell(source, "echo changed > note")
            await source.halt()
            hosts.sp.info(HibernateVm(vm_id=hosts.vm_id))
            last = await gathered(source.finish_copy(HANDOFF, STOP))
            await source.stop()
            await destination.put_memory(newest([*first, last[-1]]))
            with pytest.raises(MachineFailed, match="did not come up"):
                await hosts.resume(destination)
            assert destination.state == "none"
            assert [path.name for path in destination.image.parent.iterdir()] == ["image"]
            assert await destination.read_image() == _stream([*first, last[-1]])

    asyncio.run(move())


def newest(records: list[bytes]) -> NewestRecords:
    """As whoever gathers them has them."""
    gathered = NewestRecords()
    for record in records:
        gathered.take(record)
    return gathered


def _stream(records: list[bytes]) -> bytes:
    return newest(records).stream()


def test_memory_without_its_end_is_not_stored(hosts: Hosts) -> None:
    vm = hosts.vm("b")
    with pytest.raises(MemoryStreamDamaged):
        asyncio.run(vm.put_memory(newest([])))
    assert not vm.image.exists()


@pytest.mark.attack("A25")
@pytest.mark.parametrize("trick", ["pipe", "link", "noise", "huge"])
def test_a_hostile_vm_in_place_of_its_machine_gets_nothing_read_but_its_own(hosts: Hosts, trick: str) -> None:
    """A VM's programs may be the same user as its machine: what lies there as its copy may be anything."""

    async def move() -> None:
        source = await hosts.running("a")
        with no_machine_left(source):
            copy = source.image.parent / "copy"
            script = {
                "pipe": f"rm -f {copy}; mkfifo {copy}",
                "link": f"ln -sf {hosts.sp.state}/sp.toml {copy}",
                "noise": f"head -c 1000 /dev/urandom > {copy}",
                "huge": f"head -c 20000000 /dev/zero > {copy}",
            }[trick]
            busy = f"setsid sh -c 'while :; do {script}; done' </dev/null >/dev/null 2>&1 &"
            await hosts.shell(source, busy)
            for _ in range(20):
                try:
                    for record in await gathered(source.copy_memory(os.urandom(16))):
                        parse_record(record)
                except SpvtpmError:
                    pass
            assert source.state == "running"
            await source.stop()

    asyncio.run(move())
