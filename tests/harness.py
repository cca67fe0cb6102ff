"""A real secure processor in a process of its own, and VMs on it, for tests and benchmarks."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

from spvtpm.files import create_file
from spvtpm.guest.crb_driver import CrbDriver, Interface
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.processor.daemon import initialise
from spvtpm.wire import messages
from spvtpm.wire.instance_content import Policy
from spvtpm.wire.owner_messages import DestroyVm, Done
from tests.owner import ANYTHING, Owner, OwnerChannel
from tests.papers import Papers, put_chip_file

_OTHER_FIRMWARE = """
from spvtpm.processor import daemon
daemon.FIRMWARE_VERSION = {}
from spvtpm.cli import main
main()
"""


class RunningSp:
    """An SP daemon on a state directory. Starts it, stops it in order or by SIGKILL, starts it again.

    Args:
        state: made and initialised if it is missing.
        config: content of `sp.toml`, if the default will not do.
        vendor: who makes its chip; chips of one vendor here are of one fleet.
    """

    def __init__(self, state: Path, config: str | None = None, vendor: Papers | None = None) -> None:
        self.state = state
        self.log_path = state.with_name(f"{state.name}.log")
        self.owner = Owner()
        self._keys: dict[uuid.UUID, bytes] = {}
        if not (state / "fuses").exists():
            chip_file = state.with_name(f"{state.name}.chip")
            put_chip_file(chip_file, vendor)
            initialise(state, chip_file)
        if config is not None:
            (state / "sp.toml").write_text(config)
        self.start()

    def start(self, firmware: int | None = None) -> None:
        """Starts the daemon, if asked in another version of its firmware, and waits until it listens."""
        program = ["-m", "spvtpm.cli"] if firmware is None else ["-c", _OTHER_FIRMWARE.format(firmware)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, "sp", "run", str(self.state)],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        if not self.process.stdout.readline().startswith(b"listening"):
            raise AssertionError(f"the SP did not start:\n{self.log()}")

    def log(self) -> str:
        """What the daemon has logged so far."""
        return self.log_path.read_text()

    @property
    def socket(self) -> Path:
        """Where the hypervisor connects."""
        return self.state / "run" / "sp.sock"

    def call(self, request: messages.Request) -> messages.Reply:
        """One hypervisor command on a connection of its own."""
        with SecureProcessorClient(self.socket) as client:
            return client.call(request)

    def info(self, request: messages.Request) -> messages.VmInfo:
        """One hypervisor command that answers with the VM."""
        reply = self.call(request)
        assert isinstance(reply, messages.VmInfo)
        return reply

    def vm(self, vm_id: uuid.UUID) -> messages.VmInfo:
        """The VM as the hypervisor sees it."""
        return next(vm for vm in self.vms() if vm.vm_id == vm_id)

    def vms(self) -> list[messages.VmInfo]:
        """All VMs as the hypervisor sees them."""
        with SecureProcessorClient(self.socket) as client:
            return client.list_vms()

    def channel(self, owner: Owner | None = None) -> OwnerChannel:
        """A channel of an owner; of the one whose VMs the others here are."""
        return OwnerChannel(self.state / "run" / "channel.sock", owner or self.owner)

    def key(self, vm_id: uuid.UUID) -> bytes:
        """The VM's key, as the VM has it."""
        return self._keys.setdefault(vm_id, os.urandom(32))

    def keep_key(self, vm_id: uuid.UUID, vm_key: bytes) -> None:
        """The VM key, 32 bytes, of a VM that somebody else has provisioned."""
        self._keys[vm_id] = vm_key

    def key_file(self, vm_id: uuid.UUID) -> Path:
        """The VM's key as a file of the VM, for the commands that run in it."""
        path = self.state.with_name(f"{vm_id}.key")
        if not path.exists():
            create_file(path, self.key(vm_id))
        return path

    def new_vm(self, policy: Policy = ANYTHING, channel: OwnerChannel | None = None) -> uuid.UUID:
        """A new VM, provisioned by its owner, in this channel if there is one; not launched."""
        vm_id = uuid.uuid4()
        with nullcontext(channel) if channel is not None else self.channel() as open_channel:
            open_channel.provision(vm_id, self.key(vm_id), policy)
        return vm_id

    def destroy(self, vm_id: uuid.UUID) -> None:
        """The owner destroys a VM."""
        with self.channel() as channel:
            channel.ask(DestroyVm(vm_id=vm_id), Done)

    def launch(self, channel: OwnerChannel | None = None) -> uuid.UUID:
        """A new VM, running, with a vTPM; provisioned in this channel if there is one."""
        vm_id = self.new_vm(channel=channel)
        self.info(messages.LaunchVm(vm_id=vm_id))
        return vm_id

    def launch_emulated(self, channel: OwnerChannel | None = None) -> tuple[uuid.UUID, Path]:
        """As `launch`, on the TPM emulator interface; also the socket of that."""
        vm_id = self.new_vm(channel=channel)
        vtpm = self.info(messages.LaunchVm(vm_id=vm_id, emulated=True)).vtpm
        assert vtpm is not None
        return vm_id, Path(vtpm.interface)

    def interface(self, vm_id: uuid.UUID) -> Path:
        """The VM's interface socket."""
        return self.state / "run" / f"{vm_id}.sock"

    @contextmanager
    def driver(self, vm_id: uuid.UUID) -> Iterator[CrbDriver]:
        """The VM's driver, attached."""
        with InterfaceMemory.connect(self.interface(vm_id)) as memory:
            yield CrbDriver(memory, self.key(vm_id))

    def workers(self) -> list[int]:
        """Process ids of all processes below the daemon."""
        found, queue = [], [self.process.pid]
        while queue:
            pid = queue.pop()
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                children = [int(child) for child in task.read_text().split()]
                found += children
                queue += children
        return found

    def worker_of(self, interface: Interface) -> int:
        """Process id of the worker that serves an attached interface: the one that maps the same memory file."""
        assert isinstance(interface, InterfaceMemory)
        inode = f" {os.fstat(interface.descriptors.memory).st_ino} "
        return next(pid for pid in self.workers() if inode in Path(f"/proc/{pid}/maps").read_text())

    def kill(self) -> None:
        """SIGKILL, as a power cut of the SP."""
        self.process.kill()
        self._reap()

    def _reap(self) -> int:
        code = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def has_ended(process: int, patience_ms: int = 10_000) -> bool:
    """Waits for the end of a process (or zombie); closes its descriptor, which `os.pidfd_open` gave."""
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(patience_ms))
    finally:
        os.close(process)


def is_root() -> bool:
    """Whether tests may become other users."""
    return os.geteuid() == 0
