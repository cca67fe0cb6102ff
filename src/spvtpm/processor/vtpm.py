"""One vTPM in the SP: its interface, its worker process when it has one, its durable state.

    OFF ──power_on──▶ ACTIVE ──park──▶ PARKED ──doorbell, wake──▶ ACTIVE
     ▲                  │  └──worker died──▶ FAILED
     └──────power_off───┴───────────────────────┘

    ACTIVE, PARKED ──halt──▶ HALTED ──go_on──▶ PARKED, ──leave──▶ OFF

On the TPM emulator interface a boot begins OFF, and the VM's side goes OFF ──switch_on──▶ ACTIVE, ──switch_off──▶ OFF within it.

A failed vTPM stays failed until its VM boots anew: waking it inside the same boot would reset PCRs under a running guest.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager

from spvtpm.processor.interfaces.direct_path import DirectPath
from spvtpm.processor.interfaces.emulator import SUFFIX, EmulatorInterface
from spvtpm.processor.interfaces.interface import Interface
from spvtpm.processor.nv_store import Change
from spvtpm.processor.pcr_banks import check_pcr_banks
from spvtpm.processor.residency import Residency
from spvtpm.processor.resident import Resident
from spvtpm.processor.vtpm_records import endorsement_name, record_name
from spvtpm.processor.vtpm_services import Boot, VtpmServices
from spvtpm.processor.worker.messages import (
    Off,
    Park,
    Parked,
    PowerOff,
    Start,
    StillBusy,
)
from spvtpm.processor.worker_pool import Blank
from spvtpm.processor.worker_session import misbehaviour
from spvtpm.wire.errors import SpvtpmError, WorkerError, WrongState
from spvtpm.wire.vtpm_endorsement import encode_endorsement

log = logging.getLogger(__name__)

_WAKE_PAUSE_S = 0.5
"""After a wake that failed for want of a worker, before the doorbell is looked at again."""


class Vtpm(Resident):
    """One vTPM, bound to one VM. Public methods exclude each other and end in a stable residency.

    Args:
        vtpm_id: its id.
        vm_id: the VM it is bound to.
        services: what the SP shares among its vTPMs.
    """

    def __init__(self, vtpm_id: uuid.UUID, vm_id: uuid.UUID, services: VtpmServices) -> None:
        super().__init__(vtpm_id, vm_id, services)
        self._boot: Boot | None = None

    async def begin(
        self,
        blank: Blank,
        boot: Boot,
        with_changes: Sequence[Change],
        pcr_banks: Collection[str] = (),
    ) -> None:
        """Powers a new TPM on; its first state, its EK certificates and `with_changes` become durable together.

        Args:
            blank: the TPM, born with this vTPM's id.
            boot: that is under way.
            with_changes: to NV.
            pcr_banks: names of the PCR banks that it has; none: as it is manufactured.

        Raises:
            PcrBankUnknown: there is no such bank; nothing was made.
            StorageError: nothing is durable, nothing was made.
            WorkerError: the worker died.
            ResourceError: no interface can be had.
        """
        check_pcr_banks(pcr_banks)
        endorsement = endorsement_name(self.vtpm_id), encode_endorsement(blank.birth.endorsement)
        async with self._lock, self._beginning(boot) as (interface, listen):
            start = Start(interface.port(self.vm_id.bytes, boot, None), pcr_banks=sorted(pcr_banks))
            await self._run_worker(blank.worker, start, [endorsement, *with_changes], listen)
            if interface.switched_by_vm:
                await self._shut_down()
                self._require(Residency.OFF, "begin")

    async def power_on(
        self, boot: Boot, volatile: bytes | None = None, *, permanent: bytes | None = None, offered: bool = True
    ) -> None:
        """Begins a boot from the durable state.

        Args:
            boot: that is under way.
            permanent: its state, if that is not durable here yet.
            volatile: as `halt` gave it, to go on there; otherwise the TPM starts anew.
            offered: whether its VM can reach it at once; otherwise it waits for `offer`.

        Raises:
            IntegrityError: the stored state is missing or altered.
            WorkerError: the worker died.
            ResourceError: no interface can be had.
        """
        async with self._lock, self._beginning(boot) as (interface, listen):
            permanent = permanent or self._services.store.read(record_name(self.vtpm_id))
            if not interface.switched_by_vm:
                port = interface.port(self.vm_id.bytes, boot, None)
                start = Start(port, permanent, volatile, reseed=volatile is not None)
                await self._run_worker(await self._services.pool.take(), start, [], listen if offered else None)
            elif listen is not None:
                listen()

    async def offer(self) -> None:
        """Lets its VM reach it, if `power_on` has not; who waits long for that is parked meanwhile.

        Raises:
            WrongState: it is neither active nor parked.
            ResourceError: no socket can be had.
        """
        async with self._lock:
            if self.residency is not Residency.PARKED:
                self._require(Residency.ACTIVE, "offer")
            assert self.interface is not None  # noqa: S101  # kept as long as a boot lasts
            self.interface.listen()

    @asynccontextmanager
    async def _beginning(self, boot: Boot) -> AsyncIterator[tuple[Interface, Callable[[], None] | None]]:
        """The boot's interface and, if that is new, what offers it; it is given back then if the body fails."""
        if self.residency is not Residency.OFF:
            raise WrongState(f"vTPM {self.vtpm_id} is {self.residency.value}, not off")
        is_new = self.interface is None
        interface = self.interface = self.interface or self._new_interface(boot)
        self._boot = boot
        try:
            yield interface, interface.listen if is_new else None
        except SpvtpmError:
            if is_new:
                self._release_interface()
            raise

    def _new_interface(self, boot: Boot) -> Interface:
        runtime = self._services.runtime
        if boot.emulated:
            return EmulatorInterface(runtime / f"{self.vm_id}{SUFFIX}", boot.uids, self)
        return DirectPath(runtime / f"{self.vm_id}.sock", boot.uids, self._name)

    async def switch_on(self) -> None:
        """Powers the TPM on within a boot, as after a reset; for the TPM emulator interface.

        Raises:
            WrongState: it is not off.
            IntegrityError: its durable state is missing or altered.
            WorkerError: the worker died.
        """
        async with self._lock:
            self._require(Residency.OFF, "switch on")
            if self.interface is None or self._boot is None:
                raise WrongState(f"switch on: the boot of vTPM {self.vtpm_id} is over")
            permanent = self._services.store.read(record_name(self.vtpm_id))
            start = Start(self.interface.port(self.vm_id.bytes, self._boot, None), permanent)
            await self._run_worker(await self._services.pool.take(), start, [])

    async def switch_off(self) -> None:
        """Shuts the TPM down within a boot, in order if it still can.

        Raises:
            WrongState: it has failed: only a new boot leads on.
        """
        async with self._lock:
            await self._end_in_order()
            self._require(Residency.OFF, "switch off")

    async def park(self, *, only_if_idle: bool = False) -> bool:
        """Takes the state out of the worker and ends it.

        Args:
            only_if_idle: leave it alone if it has worked since the last such call.

        Returns:
            Whether the vTPM is parked now.

        Raises:
            WrongState: it is not active.
            WorkerError: the worker died.
        """
        async with self._lock:
            self._require(Residency.ACTIVE, "park")
            if not await self._park(only_if_idle=only_if_idle):
                return False
            self._watch()
            return True

    async def _park(self, *, only_if_idle: bool) -> bool:
        reply = await self._order(Park(only_if_idle))
        if isinstance(reply, StillBusy):
            return False
        if not isinstance(reply, Parked):
            error = misbehaviour(f"vTPM {self.vtpm_id}", reply)
            await self._fail(str(error))
            raise error
        self._services.parking.put(self.vtpm_id, reply)
        await self._dismiss(Residency.PARKED)
        return True

    async def halt(self) -> bytes:
        """Takes the state out, to wait for `go_on` or `leave`; gives what is volatile of it. Its interface is silent meanwhile.

        Raises:
            WrongState: it is off or failed, or has an NV change that is not durable yet.
            WorkerError: the worker died.
        """
        async with self._lock:
            if self.residency is Residency.PARKED and self.interface is not None:
                self.interface.leave_to_worker()
            else:
                self._require(Residency.ACTIVE, "halt")
                if not await self._park(only_if_idle=False):
                    raise WrongState(f"vTPM {self.vtpm_id} has an NV change that is not durable yet")
            self.residency = Residency.HALTED
            parked = self._services.parking.take(self.vtpm_id)
            self._services.parking.put(self.vtpm_id, parked)
            return parked.volatile

    async def go_on(self) -> None:
        """The boot goes on where it was halted.

        Raises:
            WrongState: it is not halted.
        """
        async with self._lock:
            self._require(Residency.HALTED, "go on")
            self.residency = Residency.PARKED
            self._watch()

    async def leave(self) -> None:
        """Ends the boot that was halted: its state is elsewhere.

        Raises:
            WrongState: it is not halted.
        """
        async with self._lock:
            self._require(Residency.HALTED, "leave")
            self._services.parking.drop(self.vtpm_id)
            self.residency = Residency.OFF
            self._boot = None
            self._release_interface()

    async def wake(self) -> None:
        """Gives a parked vTPM a worker again, just as it was.

        Raises:
            WrongState: it is not parked.
            IntegrityError: its durable state is missing or altered.
            WorkerError: the worker died; the vTPM has failed.
        """
        async with self._lock:
            self._require(Residency.PARKED, "wake")
            await self._wake()

    async def _wake(self) -> None:
        assert self._boot is not None and self.interface is not None  # noqa: S101  # only a boot can be parked
        self.interface.leave_to_worker()
        try:
            worker = await self._services.pool.take()
        except WorkerError:  # it stays parked
            asyncio.get_running_loop().call_later(_WAKE_PAUSE_S, self._watch_parked)
            raise
        try:
            permanent = self._services.store.read(record_name(self.vtpm_id))
            parked = self._services.parking.take(self.vtpm_id)
            port = self.interface.port(self.vm_id.bytes, self._boot, parked.snapshot)
            start = Start(port, permanent, parked.volatile, has_shut_down=parked.has_shut_down)
            await self._run_worker(worker, start, [])
        except SpvtpmError as error:
            worker.kill()
            worker.close()
            # Its volatile state is spent: from here only a new boot leads on.
            await self._fail(str(error))
            raise

    async def power_off(self) -> None:
        """Ends the boot; in order if the vTPM still can, so that the next boot finds no sign of a power cut.

        The interface stays for the next boot: a VM that is reset keeps it.
        """
        async with self._lock:
            await self._end_in_order()
            self._services.parking.drop(self.vtpm_id)
            self.residency = Residency.OFF
            self.failure = ""
            self._boot = None

    async def _end_in_order(self) -> None:
        if self.residency is Residency.PARKED:
            try:
                await self._wake()
            except SpvtpmError as error:
                log.warning("vTPM %s: cannot be woken for an orderly shutdown: %s", self.vtpm_id, error)
        if self.residency is Residency.ACTIVE:
            await self._shut_down()
        if self.residency is Residency.PARKED:  # it could not be woken: a power cut
            await self._dismiss(Residency.OFF)
            self._services.parking.drop(self.vtpm_id)

    async def _shut_down(self) -> None:
        try:
            reply = await self._order(PowerOff())
        except WorkerError as error:
            log.warning("vTPM %s: no orderly shutdown: %s", self.vtpm_id, error)
            return
        if not isinstance(reply, Off):
            log.warning("vTPM %s: no orderly shutdown: the worker said %s", self.vtpm_id, type(reply).__name__)
        await self._dismiss(Residency.OFF)

    async def release(self) -> None:
        """Gives the interface back, if there is one; the vTPM must be off."""
        async with self._lock:
            self._require(Residency.OFF, "release")
            self._release_interface()

    def cut_off(self) -> None:
        """Kills the worker, whatever is under way."""
        if self._session is not None:
            self._session.kill()

    async def abandon(self) -> None:
        """Ends everything at once, without order: before destruction, or when the SP ends."""
        async with self._lock:
            await self._dismiss(Residency.OFF)
            self._services.parking.drop(self.vtpm_id)
            self._release_interface()

    # The interface while no worker serves it

    def _watch(self) -> None:
        assert self.interface is not None  # noqa: S101  # kept as long as a boot lasts
        self.interface.watch(self._wake_on_demand)

    def _wake_on_demand(self) -> None:
        self._waking = asyncio.get_running_loop().create_task(self._wake_for_vm())

    async def _wake_for_vm(self) -> None:
        async with self._lock:
            if self.residency is Residency.PARKED:
                try:
                    await self._wake()
                except SpvtpmError as error:
                    log.error("vTPM %s cannot be woken: %s", self.vtpm_id, error)

    def _watch_parked(self) -> None:
        if self.residency is Residency.PARKED and self.interface is not None and not self._lock.locked():
            self._watch()
