"""The secure processor's daemon: start, stop, recover. Owns every other part.

State directory, mode 0700 (0711 if other users are allowed to connect):

    fuses/         the chip's secrets and its counter (a directory that stands for fuses)
    sp.toml        configuration
    nv.db          sealed NV records
    run/           sockets: `sp.sock` for the hypervisor, `channel.sock` for owners' channels, `migration.sock` for other chips,
                   `<vm id>.sock` or `<vm id>.emulator.sock` for each VM
    lock           held while a daemon runs
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import assert_never

from spvtpm.files.descriptors import raise_descriptor_limit
from spvtpm.files.state_lock import lock_state
from spvtpm.files.unix_sockets import MAX_SOCKET_PATH_BYTES
from spvtpm.processor.admission import Admission
from spvtpm.processor.allowed import Here
from spvtpm.processor.channel_identity import FIRMWARE_VERSION, ChannelKeys
from spvtpm.processor.channel_port import ChannelPort
from spvtpm.processor.config import DEFAULT_TOML, load_config
from spvtpm.processor.endorser import Endorser
from spvtpm.processor.fuses import Fuses
from spvtpm.processor.fuses.keepers import IN_DIRECTORY, Keeper, burn_fuses, load_fuses, read_chip_file
from spvtpm.processor.group_commit import GroupCommit
from spvtpm.processor.hypervisor_port import HypervisorPort
from spvtpm.processor.interfaces.emulator import SUFFIX
from spvtpm.processor.launch_secrets import LaunchSecrets
from spvtpm.processor.ledger import Ledger
from spvtpm.processor.migration.departures import Departures
from spvtpm.processor.migration.manager import Migration
from spvtpm.processor.migration.peers import Peers
from spvtpm.processor.migration.port import MigrationPort
from spvtpm.processor.migration.realm import Realm
from spvtpm.processor.migration.tokens import derive_abort_key
from spvtpm.processor.nv_store import NvStore
from spvtpm.processor.own_memory import protect_own_memory
from spvtpm.processor.owner_commands import Estate
from spvtpm.processor.owner_session import OwnerSession
from spvtpm.processor.parking import ParkingLot
from spvtpm.processor.rollback_guard import RollbackGuard, check_epoch
from spvtpm.processor.security_manager import SecurityManager
from spvtpm.processor.users import Users
from spvtpm.processor.vm_table import VmTable
from spvtpm.processor.vtpm_manager import VtpmManager
from spvtpm.processor.vtpm_services import VtpmServices
from spvtpm.processor.worker_pool import WorkerPool
from spvtpm.wire import messages
from spvtpm.wire.errors import AlreadyInitialised, FusesError, NoSecureProcessor, StorageError

log = logging.getLogger(__name__)

_LONGEST_SOCKET = f"/run/{uuid.UUID(int=0)}{SUFFIX}"


def initialise(state: Path, chip_file: Path, keeper: Keeper = IN_DIRECTORY) -> Fuses:
    """Makes a new secure processor in an empty directory: configuration, NV store, and fuses last of all.

    Args:
        state: the directory; made if it is missing.
        chip_file: as the vendor made it; it is moved into the fuses.
        keeper: what keeps the chip's secrets.

    Raises:
        ChipFileError: it is no chip file.
        FusesError: the keeper does not take it; the directory is empty again.
        AlreadyInitialised: there is one in this directory.
        NoSecureProcessor: the directory is not empty, or its path too long for the sockets in it.
        StorageError: it cannot be written.
    """
    chip = read_chip_file(chip_file)
    _check_length(state.absolute())
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (state / "fuses").exists():
            raise AlreadyInitialised(f"there is a secure processor in {state} already")
        if any(state.iterdir()):
            raise NoSecureProcessor(f"{state} is not empty: a new secure processor needs a directory of its own")
        state.chmod(0o700)
        (state / "sp.toml").write_text(DEFAULT_TOML)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or state}: {error.strerror}") from None
    NvStore.create(state / "nv.db", chip.storage_root_key)
    try:
        return burn_fuses(state / "fuses", chip_file, keeper)
    except FusesError:
        _empty(state)  # so that it can be tried again
        raise


class SecureProcessor:
    """One running SP. Life: construct (checks and loads everything) → `run()`.

    Args:
        state: the state directory, made by `initialise`.

    Raises:
        FusesError: the fuses are missing or damaged.
        StateInUse: another daemon runs on it.
        NoSecureProcessor: there is none in this directory.
        IntegrityError: the NV store is not what this SP wrote.
        StorageError: something cannot be read.
    """

    def __init__(self, state: Path) -> None:
        state = state.absolute()
        _check_length(state)
        self._missing = protect_own_memory()
        if not state.is_dir():
            raise NoSecureProcessor(f"{state} is no directory")
        if not (state / "fuses").exists() and not (state / "nv.db").exists():
            raise NoSecureProcessor(f"there is no secure processor in {state}")
        self._state = state
        self._config = load_config(state / "sp.toml")
        with ExitStack() as cleanup:
            cleanup.callback(os.close, lock_state(state))
            self._fuses = load_fuses(state / "fuses")
            self._store = NvStore(state / "nv.db", self._fuses.storage_root_key)
            cleanup.callback(self._store.close)
            check_epoch(self._store, self._fuses.counter)
            self._cleanup = cleanup.pop_all()
        self._stopping = asyncio.Event()

    async def run(self, on_ready: Callable[[Path], None]) -> None:
        """Serves until SIGTERM or SIGINT, then shuts every vTPM down in order. Not to be called again.

        Args:
            on_ready: told the path of the hypervisor's socket once it listens.

        Raises:
            ResourceError: a socket cannot be had.
            WorkerError: this machine cannot run workers.
        """
        raise_descriptor_limit()
        for sentence in self._missing:
            log.warning("protection: %s", sentence)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        async with AsyncExitStack() as cleanup:
            cleanup.push(self._cleanup)
            await self._serve(cleanup, on_ready)
            await self._stopping.wait()
            log.info("stopping: shutting vTPMs down in order")

    async def _serve(self, cleanup: AsyncExitStack, on_ready: Callable[[Path], None]) -> None:
        uids = frozenset(self._config.allowed_uids)
        users = Users(uids, self._config.users_of_vms())
        runtime = _make_runtime(self._state, users)
        pool = WorkerPool(self._config.spare_workers, Endorser(self._fuses).certify)
        cleanup.callback(pool.close)
        await pool.open()
        self._missing += pool.missing
        commit = GroupCommit(self._store).commit
        guard = RollbackGuard(self._store, commit, self._fuses.counter)
        await guard.milestone([])
        cleanup.push_async_callback(guard.close)
        config = self._config
        admission = Admission(config.max_vms, config.max_vms_of_one_owner, config.admission_required)
        self._admission, table = admission, VmTable(admission)
        services = VtpmServices(self._store, commit, pool, ParkingLot(), runtime, table.fail)
        vtpms = VtpmManager(services, self._config.park_after_s)
        cleanup.push_async_callback(vtpms.close)
        here = Here(self._fuses.chip_id, FIRMWARE_VERSION)
        secrets = LaunchSecrets(runtime, partial(table.note, commit))
        cleanup.callback(secrets.close)
        self._security = SecurityManager(self._store, commit, guard, table, vtpms, secrets, users, here)
        await self._security.load()
        for endless in (vtpms.park_idle_for_ever(), guard.keep_pace()):
            cleanup.callback(asyncio.create_task(endless).cancel)
        port = HypervisorPort(runtime / "sp.sock", uids, self.carry_out)
        cleanup.push_async_callback(port.close)
        estate = Estate(self._store, guard, table, vtpms, Ledger(self._store), secrets, here, self._fuses.sp_secret)
        keys = ChannelKeys(self._fuses)
        channels = ChannelPort(runtime / "channel.sock", uids, keys, partial(OwnerSession, estate))
        cleanup.push_async_callback(channels.close)
        peers = Peers(self._store, commit, self._fuses.certificates)
        abort_key = derive_abort_key(self._fuses.storage_root_key)
        realm = Realm(estate, users, admission, Departures(self._store), keys, peers, abort_key)
        self._migration = Migration(realm)
        cleanup.push_async_callback(self._migration.close)
        ways = MigrationPort(runtime / "migration.sock", uids, self._migration, peers)
        cleanup.push_async_callback(ways.close)
        log.info("secure processor %s runs on %s", self._fuses.chip_id.hex(), self._state)
        on_ready(runtime / "sp.sock")

    async def carry_out(self, request: messages.Request) -> messages.Reply:
        """One command of the hypervisor."""
        security = self._security
        match request:
            case messages.AdmitVm():
                self._admission.admit(request.vm_id)
                return messages.Admitted()
            case messages.LaunchVm():
                return await security.launch(request)
            case messages.CreateVtpm():
                return await security.create_vtpm(request.vm_id)
            case messages.StartVm():
                return await security.start(request)
            case messages.ResetVm():
                return await security.reset(request.vm_id)
            case messages.StopVm():
                return await security.stop(request.vm_id)
            case messages.HibernateVm():
                return await security.hibernate(request.vm_id)
            case messages.ParkVtpm():
                return await security.park(request.vm_id)
            case messages.WakeVtpm():
                return await security.wake(request.vm_id)
            case messages.SendStart():
                return await self._migration.send_start(request.vm_id)
            case messages.SendStop():
                return await self._migration.send_stop(request.vm_id, request.handoff)
            case messages.SendFinish():
                return await self._migration.send_finish(request.vm_id, request.handoff)
            case messages.SendCancel():
                return await self._migration.send_cancel(request.vm_id, request.handoff)
            case messages.SendForget():
                return await self._migration.send_forget(request.vm_id, request.handoff, request.receipt)
            case messages.ReceiveStart():
                return await self._migration.receive_start(request.vm_id, request.handoff, request.vm_uid)
            case messages.ReceiveFinish():
                return await self._migration.receive_finish(request.vm_id, request.handoff, request.token)
            case messages.ReceiveCancel():
                return await self._migration.receive_cancel(request.vm_id, request.handoff, request.token)
            case messages.GetEndorsement():
                return security.endorsement(request.vm_id)
            case messages.ListVms():
                return security.list(request.after)
            case messages.GetStatus():
                return self._status()
            case _:
                assert_never(request)

    def _status(self) -> messages.Status:
        vms, active, parked = self._security.residents()
        chip_id, software, most = self._fuses.chip_id.hex(), version("spvtpm"), self._config.max_vms
        return messages.Status(chip_id, software, vms, active, parked, self._missing, FIRMWARE_VERSION, most)


def _empty(state: Path) -> None:
    for path in state.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_length(state: Path) -> None:
    longest = MAX_SOCKET_PATH_BYTES - len(os.fsencode(_LONGEST_SOCKET))
    if len(os.fsencode(state)) > longest:
        raise NoSecureProcessor(f"the path {state} is longer than {longest} bytes: there would be no room for sockets")


def _make_runtime(state: Path, users: Users) -> Path:
    """The directory of sockets. Other users can pass through the state directory if they are allowed, and only then."""
    runtime = state / "run"
    mode = 0o711 if users.others_come or users.commanding - {0, os.geteuid()} else 0o700
    try:
        runtime.mkdir(exist_ok=True)
        if runtime.is_symlink() or runtime.stat().st_uid != os.geteuid():
            raise StorageError(f"{runtime} is a link, or somebody else's")
        for left_behind in runtime.glob("*.sock"):
            left_behind.unlink()
        for directory in (state, runtime):
            directory.chmod(mode)
    except OSError as error:
        raise StorageError(f"cannot use {error.filename}: {error.strerror}") from None
    return runtime
