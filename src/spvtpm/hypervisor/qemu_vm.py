"""The second kind of machine: a guest under QEMU, with its vTPM on the direct path, or as a device of QEMU's.

Below the agent's directory, for each VM:

    vms/<vm id>/boot       the boot that its machine takes part in
    vms/<vm id>/log        what QEMU says
    vms/<vm id>/serial     what the guest says on its serial console
    vms/<vm id>/firmware-variables   of its UEFI firmware, if it has one
    vms/<vm id>/machine/   QEMU's own: its monitor; the image of the guest's memory, once it is suspended

The guest has its VM key from its owner, in its image: QEMU is given none. Its memory, and so its image, is in clear as far as the
host's hardware leaves it so; the image stays on this host.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from spvtpm.hypervisor.config import QemuConfig
from spvtpm.hypervisor.process_machine import ProcessMachine
from spvtpm.hypervisor.qemu_command import SERIAL, SERIAL_BYTES, find_images, monitor_of, qemu_command, variables_of
from spvtpm.hypervisor.qemu_firmware import provide_variables
from spvtpm.hypervisor.qemu_memory import InterfaceBeginning, load_memory, save_memory
from spvtpm.hypervisor.qemu_monitor import Empty, KvmInfo, QemuMonitor, RunStatus
from spvtpm.hypervisor.serial_log import SerialLog
from spvtpm.hypervisor.virtual_machine import Boot, Console, MachineState
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import SpvtpmError, StorageError, WrongState
from spvtpm.wire.memory_records import NewestRecords
from spvtpm.wire.platform_errors import MachineFailed

log = logging.getLogger(__name__)

_READY_S: Final = 60.0
_LOOK_S: Final = 0.05
_POWER_OFF_S: Final = 15.0
_SERIAL_EVERY_S: Final = 1.0

_STATES: Final[dict[str, MachineState]] = {"running": "running", "paused": "halted", "postmigrate": "suspended"}
"""QEMU's words. Source: QEMU, qapi/run-state.json, RunState."""


class QemuVm(ProcessMachine):
    """A VM that QEMU runs. A `VirtualMachine`.

    Args:
        vm_id: the VM.
        directory: what the agent has of it.
        users: whose processes machines are.
        on_end: called when it ends unasked.
        config: of QEMU.
        left: process id of a machine of it that an earlier agent has started.
    """

    def __init__(
        self,
        vm_id: uuid.UUID,
        directory: Path,
        users: VmUsers,
        on_end: Callable[[], None],
        config: QemuConfig,
        left: int | None = None,
    ) -> None:
        super().__init__(vm_id, directory, users, on_end, left)
        self._config = config
        self._monitor: QemuMonitor | None = None
        self._serial: asyncio.Task[None] | None = None
        self._hanging_up: asyncio.Task[None] | None = None

    @property
    def by_emulator(self) -> bool:
        """Whether its boots reach the vTPM by the TPM emulator interface."""
        return self._config.tpm == "emulator"

    async def _find_state(self) -> None:
        self._state = await self._state_of_qemu()
        if self._state == "halted" and self._directory.resumes():
            raise MachineFailed("it has not gone on from its image whole")

    async def start(self, boot: Boot) -> None:
        """Starts it; returns once the guest runs, which boots from then on.

        Raises:
            MachineFailed: it did not come up, or there is nothing to boot.
            StorageError: there is no room for it.
        """
        images = find_images(self._config, self._directory.path.parents[1], self._vm_id)
        command = qemu_command(self._config, images, self._own, boot)
        beginning = (
            await asyncio.to_thread(InterfaceBeginning, boot.interface) if boot.resumes and boot.interface else None
        )
        try:
            self._directory.make_room()
            await self._clear()
            if images.firmware is not None:
                await asyncio.to_thread(
                    provide_variables, images.firmware, variables_of(self._own), self._directory.uid
                )
            self._directory.note_boot(boot)
            self._boots = boot.boots
            self._spawn(command)
        except OSError as error:
            raise StorageError(f"no machine for VM {self._vm_id}: {error.strerror or error}") from None
        await self._come_up(beginning, resumes=boot.resumes)

    async def await_ready(self) -> None:
        """Returns once it is ready.

        Raises:
            MachineFailed: it did not come up; nothing is left of it but an image.
        """
        await self._come_up(None, resumes=False)

    async def _come_up(self, beginning: InterfaceBeginning | None, *, resumes: bool) -> None:
        try:
            async with asyncio.timeout(_READY_S):
                await self._await_monitor()
                if resumes:
                    await load_memory(self._qemu, self.image)
                    if beginning is not None:
                        beginning.put_back()
                    await self._tell("cont")
                kvm = await self._qemu.execute("query-kvm", KvmInfo)
                self._state = await self._state_of_qemu()
        except (SpvtpmError, TimeoutError) as error:
            await self.end()
            why = str(error) or f"it was not ready after {_READY_S:g} s"
            words = self._directory.last_words()
            raise MachineFailed(f"the machine of VM {self._vm_id} did not come up: {why}{words}") from None
        log.info("VM %s: QEMU runs it %s", self._vm_id, "with KVM" if kvm.enabled else "without KVM, slowly")

    async def _await_monitor(self) -> None:
        while True:
            process = self._process
            if process is None or await process.wait(_LOOK_S):
                raise MachineFailed("QEMU has ended")
            if monitor_of(self._own).exists():
                with suppress(MachineFailed):  # it listens before it speaks
                    await self._qemu.execute("query-status", RunStatus)
                    return

    async def _state_of_qemu(self) -> MachineState:
        status = (await self._qemu.execute("query-status", RunStatus)).status
        if status not in _STATES:
            raise MachineFailed(f"QEMU is {printable(status)[:64]}")
        return _STATES[status]

    async def stop(self) -> None:
        """Presses its power button; ends it if it takes too long. Its memory is gone."""
        process = self._process
        if process is not None and self._state in ("running", "halted"):
            try:
                if self._state == "halted":
                    await self._tell("cont")
                await self._tell("system_powerdown")
                await process.wait(_POWER_OFF_S)
            except SpvtpmError as error:
                log.warning("VM %s: its machine is not powered off in order: %s", self._vm_id, error)
        await self.end()

    async def suspend(self) -> None:
        """Lets nothing run in it any more, and makes its memory durable as its image.

        Raises:
            WrongState: it has a user of its own, who alone could look at the interface when it goes on.
            SpvtpmError: it cannot be suspended, and runs on.
        """
        if self._directory.uid != os.geteuid():
            raise WrongState(f"VM {self._vm_id} is a QEMU guest with a user of its own: it cannot be suspended")
        await self._tell("stop")
        try:
            await save_memory(self._qemu, self.image)
            self._state = await self._state_of_qemu()
        except SpvtpmError:
            await self.go_on()
            raise

    async def go_on(self) -> None:
        """Lets it run on.

        Raises:
            SpvtpmError: it cannot.
        """
        await self._tell("cont")
        self._state = await self._state_of_qemu()

    async def halt(self) -> None:
        """Lets nothing run in it.

        Raises:
            SpvtpmError: it cannot be halted, and runs on.
        """
        await self._tell("stop")
        self._state = await self._state_of_qemu()

    async def copy_memory(self, handoff_id: bytes) -> AsyncIterator[bytes]:  # noqa: ARG002  # as the interface has it
        """Not to be had.

        Raises:
            WrongState: always.
        """
        raise self._stays()
        yield b""  # so it is a generator, as the interface says

    async def finish_copy(self, handoff_id: bytes, stop_nonce: bytes) -> AsyncIterator[bytes]:  # noqa: ARG002  # as above
        """Not to be had.

        Raises:
            WrongState: always.
        """
        raise self._stays()
        yield b""  # as above

    async def put_memory(self, memory: NewestRecords) -> None:  # noqa: ARG002  # as above
        """Not to be had.

        Raises:
            WrongState: always.
        """
        raise self._stays()

    async def put_image(self, image: bytes) -> None:  # noqa: ARG002  # as above
        """Not to be had.

        Raises:
            WrongState: always.
        """
        raise self._stays()

    async def read_image(self) -> bytes:
        """Not to be had: it is not encrypted.

        Raises:
            WrongState: always.
        """
        raise self._stays()

    def _stays(self) -> WrongState:
        return WrongState(
            f"VM {self._vm_id} is a QEMU guest, whose memory nothing encrypts for the way: it stays on its host"
        )

    def console(self) -> Console:
        """Not to be had.

        Raises:
            WrongState: always.
        """
        raise WrongState(f"VM {self._vm_id} is a QEMU guest: it has no console but what its owner set up in it")

    def _watch(self, pid: int) -> None:
        super()._watch(pid)
        self._monitor = QemuMonitor(monitor_of(self._own), pid)
        self._serial = asyncio.get_running_loop().create_task(self._keep_serial())

    def _ended(self) -> None:
        if self._serial is not None:
            self._serial.cancel()
            self._serial = None
        if self._monitor is not None:
            self._hanging_up = asyncio.get_running_loop().create_task(self._monitor.close())
            self._monitor = None
        super()._ended()

    async def _keep_serial(self) -> None:
        """Writes down what the guest says, while QEMU has it for as long."""
        serial = SerialLog(self._directory.path / "serial")
        while True:
            await asyncio.sleep(_SERIAL_EVERY_S)
            try:
                said = await self._qemu.execute("ringbuf-read", str, device=SERIAL, size=SERIAL_BYTES)
                serial.add(said[:SERIAL_BYTES])
            except (SpvtpmError, OSError) as error:  # it is too young, or another look has more luck
                log.debug("VM %s: its console cannot be read: %s", self._vm_id, error)

    @property
    def _qemu(self) -> QemuMonitor:
        if self._monitor is None:
            raise MachineFailed(f"the machine of VM {self._vm_id} has ended")
        return self._monitor

    async def _tell(self, command: str) -> None:
        await self._qemu.execute(command, Empty)
