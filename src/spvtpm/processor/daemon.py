"""The secure processor's daemon: start, stop, recover. Owns every other part.

State directory, mode 0700:

    fuses          the chip's secrets (a file that stands for fuses)
    sp.toml        configuration
    nv.db          sealed NV records
    vm-keys/       VM keys, a stopgap until owners send them through a confidential channel
    run/           sockets: `sp.sock` for the hypervisor, `<vm id>.sock` for each VM's interface
    lock           held while a daemon runs
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import assert_never

from spvtpm.processor.config import DEFAULT_TOML, load_config
from spvtpm.processor.fuses import Fuses, create_fuses, load_fuses
from spvtpm.processor.hypervisor_port import HypervisorPort
from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.own_memory import protect_own_memory
from spvtpm.processor.parking import ParkingLot
from spvtpm.processor.security_manager import SecurityManager
from spvtpm.processor.state_lock import lock_state
from spvtpm.processor.vm_keys import VmKeyFiles
from spvtpm.processor.vtpm import VtpmServices
from spvtpm.processor.vtpm_manager import VtpmManager
from spvtpm.processor.worker_pool import WorkerPool
from spvtpm.wire import messages
from spvtpm.wire.errors import StorageError

log = logging.getLogger(__name__)


def initialise(state: Path) -> Fuses:
    """Makes a new secure processor: burns fuses, writes a configuration and an empty NV store.

    Raises:
        AlreadyExists: there is one in this directory.
        StorageError: the directory cannot be written.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state / "vm-keys").mkdir(mode=0o700, exist_ok=True)
        fuses = create_fuses(state / "fuses")
        (state / "sp.toml").write_text(DEFAULT_TOML)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or state}: {error.strerror}") from None
    NvStore.create(state / "nv.db", fuses.storage_root_key)
    return fuses


class SecureProcessor:
    """One running SP. Life: construct (checks and loads everything) → `run()`.

    Args:
        state: the state directory, made by `initialise`.

    Raises:
        FusesError: the fuses are missing or damaged.
        StateInUse: another daemon runs on it.
        IntegrityError: the NV store is not what this SP wrote.
        StorageError: something cannot be read.
    """

    def __init__(self, state: Path) -> None:
        self._missing = protect_own_memory()
        if not state.is_dir():
            raise StorageError(f"{state} is no directory; `spvtpm sp init` makes one")
        self._lock = lock_state(state)
        self._state = state
        self._config = load_config(state / "sp.toml")
        self._fuses = load_fuses(state / "fuses")
        self._store = NvStore(state / "nv.db", self._fuses.storage_root_key)
        self._stopping = asyncio.Event()

    async def run(self, on_ready: Callable[[Path], None]) -> None:
        """Serves until SIGTERM or SIGINT, then shuts every vTPM down in order.

        Args:
            on_ready: told the path of the hypervisor's socket once it listens.
        """
        _raise_descriptor_limit()
        for sentence in self._missing:
            log.warning("protection: %s", sentence)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        runtime = self._state / "run"
        runtime.mkdir(mode=0o700, exist_ok=True)
        uids = frozenset(self._config.allowed_uids)
        pool = WorkerPool(self._config.spare_workers)
        await pool.open()
        self._missing += pool.missing
        vtpms = VtpmManager(VtpmServices(self._store, pool, ParkingLot(), runtime, uids), self._config.park_after_s)
        keys = VmKeyFiles(self._state / "vm-keys")
        self._security = SecurityManager(self._store, vtpms, keys, self._config.max_vms)
        self._security.load()
        port = HypervisorPort(runtime / "sp.sock", uids, self.carry_out)
        parking = asyncio.create_task(vtpms.park_idle_for_ever())
        log.info("secure processor %s runs on %s", self._fuses.chip_id.hex(), self._state)
        on_ready(runtime / "sp.sock")
        await self._stopping.wait()
        log.info("stopping: shutting vTPMs down in order")
        port.close()
        parking.cancel()
        await vtpms.close()
        pool.close()
        self._store.close()
        os.close(self._lock)

    async def carry_out(self, request: messages.Request) -> messages.Reply:
        """One command of the hypervisor."""
        security = self._security
        match request:
            case messages.LaunchVm():
                return await security.launch(request.vm_id, with_vtpm=request.with_vtpm)
            case messages.CreateVtpm():
                return await security.create_vtpm(request.vm_id)
            case messages.StartVm():
                return await security.start(request.vm_id)
            case messages.ResetVm():
                return await security.reset(request.vm_id)
            case messages.StopVm():
                return await security.stop(request.vm_id)
            case messages.DecommissionVm():
                await security.decommission(request.vm_id)
                return messages.Done()
            case messages.DestroyVtpm():
                return await security.destroy_vtpm(request.vm_id)
            case messages.ParkVtpm():
                return await security.park(request.vm_id)
            case messages.WakeVtpm():
                return await security.wake(request.vm_id)
            case messages.ListVms():
                return messages.VmList(security.list())
            case messages.GetStatus():
                vms, active, parked = security.residents()
                return messages.Status(self._fuses.chip_id, version("spvtpm"), vms, active, parked, self._missing)
            case _:
                assert_never(request)


def _raise_descriptor_limit() -> None:
    """Each vTPM costs about six descriptors: take as many as this user may have."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
