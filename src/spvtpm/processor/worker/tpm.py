"""The TPM inside a worker: an engine whose NV changes are durable before any answer leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spvtpm.engine.errors import EngineError
from spvtpm.engine.libtpms import Engine
from spvtpm.processor.interfaces.direct import TpmAccess, TpmFailedError
from spvtpm.processor.worker.making import NewTpm, allocate_banks
from spvtpm.processor.worker.messages import Endorse, Endorsed, Start, StreamPort
from spvtpm.processor.worker.packing import pack_volatile, unpack_volatile
from spvtpm.processor.worker.tpm_commands import SHUTDOWN_CLEAR
from spvtpm.wire.ek_templates import EkTemplate


class WorkerTpm:
    """One TPM. Life: construct → `make_blank()`, if there is time → `start()` → `execute()` … → `take_state()` or `shut_down()`.

    Args:
        commit: returns once a permanent state is durable, or raises `StorageError`; calls its second argument meanwhile.
        endorse: has the EKs of a new TPM certified.
    """

    def __init__(
        self, commit: Callable[[bytes, Callable[[], None]], None], endorse: Callable[[Endorse], Endorsed]
    ) -> None:
        self._commit = commit
        self._endorse = endorse
        self._engine = Engine(self._stored)
        self._durable = b""
        self._latest = b""

    def _stored(self, permanent: bytes) -> None:
        self._latest = permanent

    def make_blank(self, templates: Sequence[EkTemplate]) -> None:
        """Manufactures a TPM ahead of need, with EKs that the SP has certified; `start` makes it durable.

        Args:
            templates: of the EKs; an RSA key takes a while.

        Raises:
            EngineError: libtpms cannot.
        """
        self._engine.manufacture()
        new = NewTpm(self._engine.process, templates)
        new.store(self._endorse(new.endorse))
        self._take_power_away_once()

    def start(self, start: Start, meanwhile: Callable[[], None]) -> None:
        """Manufactures or resumes the TPM; returns once its state is durable and `meanwhile`, called once, is done.

        Raises:
            EngineError: libtpms refused the state, or the new TPM cannot be as it is asked for.
            IntegrityError: the volatile state is not packed as it should be.
            StorageError: the new state is not durable.
        """
        if isinstance(start.port, StreamPort) and not self._engine.is_on:
            self._engine.set_buffer_size(start.port.buffer_bytes)
        if start.permanent is not None:
            self._resume(start, start.permanent)
        elif not self._engine.is_on:
            self._engine.manufacture()
        if start.pcr_banks:
            allocate_banks(self._engine.process, start.pcr_banks)
            self._take_power_away_once()
        if self.waits_for_storage:
            self.make_durable(meanwhile)
        else:
            meanwhile()

    def _resume(self, start: Start, permanent: bytes) -> None:
        self._durable = self._latest = permanent
        self._engine.resume(permanent, None if start.volatile is None else unpack_volatile(start.volatile))
        if start.reseed and start.volatile is not None:
            self._engine.reseed()  # without a volatile state, TPM2_Startup does it

    def _take_power_away_once(self) -> None:
        """So that the guest finds the TPM as new."""
        self._engine.power_off()
        self._engine.resume(self._latest)

    @property
    def access(self) -> TpmAccess:
        """For compiled code that executes commands by itself: it calls `make_durable` when `stores` has changed."""
        return TpmAccess(*self._engine.addresses)

    def make_durable(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Returns once every change is durable; one that storage refuses is kept, and tried again at the next call.

        Raises:
            StorageError: it is not.
        """
        if self._latest != self._durable:
            self._commit(self._latest, meanwhile)
            self._durable = self._latest

    @property
    def waits_for_storage(self) -> bool:
        """Whether a change was refused by storage and waits for the next try."""
        return self._latest != self._durable

    def execute(self, command: bytes) -> bytes:
        """Runs one command; its NV changes, and those that waited, are durable when this returns.

        Raises:
            StorageError: a change is not durable; there is no answer to give.
            TpmFailedError: libtpms cannot go on.
        """
        self.make_durable()
        try:
            response = self._engine.process(command)
        except EngineError as error:
            raise TpmFailedError(str(error)) from error
        self.make_durable()
        return response

    def cancel(self) -> None:
        """Cancels the running command; from another thread."""
        self._engine.cancel()

    def close(self) -> None:
        """Takes the power away."""
        self._engine.close()

    def take_state(self) -> bytes:
        """Volatile state as `Start` takes it; it fits the permanent state that is durable.

        Raises:
            StorageError: that is not durable.
        """
        self._latest = self._engine.permanent_state()
        self.make_durable()
        return pack_volatile(self._engine.volatile_state())

    def shut_down(self) -> None:
        """Orderly shutdown, so that the next start finds no sign of a power cut (and no dictionary attack penalty).

        Raises:
            StorageError: its changes are not durable.
        """
        self.execute(SHUTDOWN_CLEAR)
