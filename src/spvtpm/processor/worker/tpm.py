"""The TPM inside a worker: an engine whose NV changes are durable before any answer leaves."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from spvtpm.engine.libtpms import Engine, EngineError
from spvtpm.processor.interfaces.direct import TpmFailedError
from spvtpm.processor.worker.messages import Start

_ORDINAL = struct.Struct(">6xI")

LONG_COMMANDS = frozenset(
    {
        0x00000131,  # TPM2_CreatePrimary
        0x00000153,  # TPM2_Create
        0x00000191,  # TPM2_CreateLoaded
    }
)
"""Commands that can generate RSA keys, the only ones long enough to be worth cancelling; libtpms looks at its cancel
flag nowhere else. Source: TCG TPM 2.0 Library Part 2, table "TPM_CC constants"."""

_SHUTDOWN_CLEAR = bytes.fromhex("80010000000c000001450000")
"""TPM2_Shutdown(TPM_SU_CLEAR). Source: TCG TPM 2.0 Library Part 3, section "TPM2_Shutdown"."""


class WorkerTpm:
    """One TPM. Life: construct → `start()` → `execute()` … → `take_state()` or `shut_down()`.

    Args:
        commit: returns once a permanent state is durable, or raises `StorageError`.
        watch: gives a context in which a long command can be cancelled; called with the function that cancels.
    """

    def __init__(
        self,
        commit: Callable[[bytes], None],
        watch: Callable[[Callable[[], None]], AbstractContextManager[None]],
    ) -> None:
        self._commit = commit
        self._watch = watch
        self._engine = Engine(self._stored)
        self._durable = b""
        self._latest = b""
        self.executed = 0

    def _stored(self, permanent: bytes) -> None:
        self._latest = permanent

    def start(self, start: Start) -> None:
        """Manufactures or resumes the TPM; returns once its state is durable.

        Raises:
            EngineError: libtpms refused the state.
            StorageError: the new state is not durable.
        """
        if start.permanent is None:
            self._engine.manufacture()
        else:
            self._durable = self._latest = start.permanent
            self._engine.resume(start.permanent, start.volatile)
        self._make_durable()

    def _make_durable(self) -> None:
        if self._latest != self._durable:
            self._commit(self._latest)
            self._durable = self._latest

    @property
    def waits_for_storage(self) -> bool:
        """Whether a change was refused by storage and waits for the next try."""
        return self._latest != self._durable

    def execute(self, command: bytes) -> bytes:
        """Runs one command; its NV changes are durable when this returns.

        A change that storage refused stays in the TPM, unacknowledged, and is tried again before the next command.

        Raises:
            StorageError: a change is not durable; there is no answer to give.
            TpmFailedError: libtpms cannot go on.
        """
        self._make_durable()
        self.executed += 1
        long_running = len(command) >= _ORDINAL.size and _ORDINAL.unpack_from(command)[0] in LONG_COMMANDS
        cancellable = self._watch(self._engine.cancel) if long_running else nullcontext()
        try:
            with cancellable:
                response = self._engine.process(command)
        except EngineError as error:
            raise TpmFailedError(str(error)) from error
        self._make_durable()
        return response

    def take_state(self) -> tuple[bytes, bytes | None]:
        """Volatile state, and the permanent state where it differs from the durable one."""
        permanent = self._engine.permanent_state()
        return self._engine.volatile_state(), None if permanent == self._durable else permanent

    def shut_down(self) -> None:
        """Orderly shutdown, so that the next start finds no sign of a power cut (and no dictionary attack penalty).

        Raises:
            StorageError: its changes are not durable.
        """
        self.execute(_SHUTDOWN_CLEAR)
