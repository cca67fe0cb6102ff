"""One TPM 2.0 in this process: libtpms, with its state going in and out as bytes. Only the owner of that state comes in.

libtpms checks next to nothing about a state blob: a flipped bit is mostly accepted, a crafted blob reads out of
bounds. **Whoever calls `Engine.resume` must have authenticated both blobs**, and their belonging together, before.

libtpms is one set of globals: one live `Engine` per process, one call at a time (only `cancel` may come from elsewhere).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, Self

from spvtpm.engine._libtpms import ffi, lib
from spvtpm.engine.errors import (
    Blob,
    CommandTooLong,
    DamagedState,
    EngineBusy,
    EngineInUse,
    LocalityOutOfRange,
    ProfileRefused,
    TpmFailed,
    WrongPowerState,
)

# Source: TPM_BUFFER_MAX of libtpms; the PC Client profile's buffers are never larger.
MAX_COMMAND_BYTES: Final[int] = lib.ENGINE_BUFFER_SIZE
# Source: TCG TPM 2.0 Library Part 1, "Locality": 0 to 4, above 31 extended ones that no PC client has.
MAX_LOCALITY: Final = 4
# Source: libtpms/tpm_error.h, TPM_SUCCESS.
_SUCCESS: Final = 0
# Source: TCG TPM 2.0 Library Part 2, tables TPM_CC, TPM_ST, TPM_SU, TPM_RC; Part 3, sections of these commands.
_STARTUP_CLEAR: Final = struct.pack(">HIIH", 0x8001, 12, 0x144, 0x0000)
_SELF_TEST_FULL: Final = struct.pack(">HIIB", 0x8001, 11, 0x143, 1)
_NOT_STARTED: Final = 0x100  # TPM_RC_INITIALIZE
_STIR_RANDOM_HEADER: Final = struct.pack(">HIIH", 0x8001, 140, 0x146, 128)


class BufferSize(NamedTuple):
    """Bytes that a command or a response may have, and the limits of libtpms for it."""

    current: int
    smallest: int
    largest: int


class Engine:
    """A TPM 2.0: off at first, on after `manufacture` or `resume`, off after `power_off`, gone after `close`.

    Nobody can assert physical presence; commands come at locality 0 until `locality` is set.
    """

    __slots__ = (
        "_callback_error",
        "_is_on",
        "_is_store_lost",
        "_on_permanent_state",
        "_response",
        "_response_bytes",
    )

    def __init__(self, on_permanent_state: Callable[[bytes], None]) -> None:
        """Takes this process's only TPM, powered off.

        Args:
            on_permanent_state: called with the whole permanent state each time it changes, before the response of the
                command that changed it is given out. It must make the state durable, or raise: then `process` (or
                `manufacture`, `resume`) raises that same exception, no response is given out, and the TPM is in
                failure mode (every command answers TPM_RC_FAILURE, 0x101) until `power_off` and `resume`.
                It cannot use the engine.

        Raises:
            EngineInUse: close the other engine first.
        """
        global _live  # noqa: PLW0603 - libtpms is a global itself
        if _live is not None:
            raise EngineInUse("This process has a live TPM engine, and libtpms has room for one: close it first.")
        self._on_permanent_state = on_permanent_state
        self._callback_error: BaseException | None = None
        self._is_on = False
        self._is_store_lost = False
        self._response = ffi.new("unsigned char[]", MAX_COMMAND_BYTES)
        self._response_bytes = ffi.buffer(self._response)
        _check(lib.engine_prepare(), "libtpms does not take this TPM's callbacks")
        _set_buffer_size(MAX_COMMAND_BYTES)
        lib.engine_locality = 0
        _live = self

    def manufacture(self, profile: str | None = None) -> None:
        """Powers a brand-new TPM on, with seeds of its own; it needs TPM2_Startup. The callback gets its state.

        Args:
            profile: a libtpms profile as JSON, fixed for this TPM's life; None for the library's default.

        Raises:
            ProfileRefused: nothing was manufactured.
            TpmFailed: nothing was manufactured.
        """
        with self._powered(on=False):
            if lib.engine_has_profiles():
                result = lib.engine_set_profile(ffi.NULL if profile is None else profile.encode())
                if result != _SUCCESS:
                    raise ProfileRefused(f"libtpms refuses this profile (result {result:#x}).")
            elif profile is not None:
                raise ProfileRefused("This libtpms does not support profiles: they need version 0.10 or later.")
            lib.engine_forget_cached_state()
            lib.engine_allow_manufacture(True)
            try:
                self._power_on("libtpms could not manufacture a TPM")
            finally:
                lib.engine_allow_manufacture(False)

    def resume(self, permanent: bytes, volatile: bytes | None = None) -> None:
        """Powers a TPM on from its state, which the caller **must have authenticated** (see the module's docstring).

        This never manufactures: a missing or damaged state is an error. The callback gets the permanent state at once.

        Args:
            permanent: as the callback got it last, or as `permanent_state` gave it.
            volatile: as `volatile_state` gave it at the same moment: the TPM goes on where it was and needs no
                TPM2_Startup. None is a cold boot, which needs one.

        Raises:
            DamagedState: names the blob that libtpms refuses; try another one.
            TpmFailed: libtpms took the state but could not start with it.
        """
        with self._powered(on=False):
            lib.engine_forget_cached_state()
            self._set_state(lib.TPMLIB_STATE_PERMANENT, Blob.PERMANENT, permanent)
            if volatile is not None:
                self._set_state(lib.TPMLIB_STATE_VOLATILE, Blob.VOLATILE, volatile)
            self._power_on("libtpms could not start with this state")

    def process(self, command: bytes) -> bytes:
        """Executes one command and gives its response; whatever it made durable was handed to the callback before.

        Args:
            command: at most 4096 bytes. Anything shorter is the TPM's to judge, the empty command too.

        Raises:
            CommandTooLong: nothing was executed.
            WrongPowerState: the TPM is off.
            EngineBusy: another thread is inside; nothing was executed.
            Exception: what the callback raised (see `__init__`).
        """
        size: int = lib.engine_process(command, len(command), self._response)
        if size <= 0:
            self._raise_process_error(size)
        response: bytes = self._response_bytes[:size]
        return response

    @property
    def addresses(self) -> tuple[int, int]:
        """For compiled code that executes commands without Python: of `int64_t (const uint8_t *command, uint32_t size,
        uint8_t response[4096])`, and of the 32-bit number of permanent states handed to the callback so far.

        The function gives the number of response bytes, or a number below 1 where `process` would raise.
        """
        process = ffi.addressof(lib, "engine_process")
        return int(ffi.cast("uintptr_t", process)), int(ffi.cast("uintptr_t", ffi.addressof(lib, "engine_stores")))

    def cancel(self) -> None:
        """Asks the running command to stop: it answers TPM_RC_CANCELED (0x909) or completes. From any thread.

        It is lost when no command runs: call it again until `process` returns, if the command must end.
        """
        if _live is self:
            lib.TPMLIB_CancelCommand()

    def reseed(self) -> None:
        """Stirs fresh randomness of the host into the TPM's generator. One that waits for TPM2_Startup does so itself then.

        Two TPMs resumed from one volatile state draw the same random numbers until this is called in each; call it
        after every import. It ends an exclusive audit session, as any other command does.

        Raises:
            TpmFailed: the TPM refused.
        """
        response = self.process(_STIR_RANDOM_HEADER + os.urandom(128))
        result = int.from_bytes(response[6:10], "big")
        if result != _NOT_STARTED:
            _check(result, "The TPM does not take new randomness")

    def permanent_state(self) -> bytes:
        """The live permanent state: seeds, hierarchy settings, persistent objects and NV indices. Secret."""
        return self._state(lib.TPMLIB_STATE_PERMANENT)

    def volatile_state(self) -> bytes:
        """The live volatile state: PCRs, loaded objects, sessions, random generator. Secret."""
        return self._state(lib.TPMLIB_STATE_VOLATILE)

    def power_off(self) -> None:
        """Takes the power away, without TPM2_Shutdown. What was not stored and not taken out is lost."""
        with self._entered():
            if self._is_on:
                self._terminate()

    def close(self) -> None:
        """Powers off and makes room for another engine; doing it twice is fine."""
        global _live  # noqa: PLW0603
        if _live is self:
            self.power_off()
            self._response = ffi.NULL  # `process` is refused from here on, without a check of its own
            _live = None

    @property
    def is_on(self) -> bool:
        """Whether the TPM is powered on."""
        return self._is_on

    @property
    def locality(self) -> int:
        """The locality of the next command, 0 to 4; kept over power cycles.

        Raises:
            LocalityOutOfRange: by the setter (libtpms would silently take 0 instead).
        """
        locality: int = lib.engine_locality
        return locality

    @locality.setter
    def locality(self, locality: int) -> None:
        if not 0 <= locality <= MAX_LOCALITY:
            raise LocalityOutOfRange(f"A locality is 0 to {MAX_LOCALITY}, not {locality}.")
        if _live is self:
            lib.engine_locality = locality

    @property
    def buffer_size(self) -> BufferSize:
        """The size of the command and response buffers that the TPM reports to its user."""
        return _set_buffer_size(0)

    def set_buffer_size(self, size_bytes: int) -> BufferSize:
        """Chooses the buffer size, clamped to the limits, for all further power cycles; the TPM must be off."""
        with self._powered(on=False):
            return _set_buffer_size(max(1, min(size_bytes, MAX_COMMAND_BYTES)))

    @staticmethod
    def version() -> tuple[int, int, int]:
        """The version of the libtpms that runs: major, minor, micro."""
        packed: int = lib.TPMLIB_GetVersion()
        return packed >> 16, packed >> 8 & 0xFF, packed & 0xFF

    @staticmethod
    def supports_profiles() -> bool:
        """Whether the libtpms that runs knows profiles (0.10 and later)."""
        return bool(lib.engine_has_profiles())

    @staticmethod
    def warm_up() -> None:
        """Manufactures, tests and drops a TPM, so that all that OpenSSL loads lazily is in memory before a fork.

        Forked children need no file access then, and share no randomness: OpenSSL reseeds itself after a fork.

        Raises:
            EngineInUse: as `__init__`.
            TpmFailed: this machine's libtpms or OpenSSL does not pass the TPM's self-test.
        """
        with Engine(_discard) as engine:
            engine.manufacture()
            for command in (_STARTUP_CLEAR, _SELF_TEST_FULL):
                _check(int.from_bytes(engine.process(command)[6:10], "big"), "The TPM fails its first self-test")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if _live is not self:
            raise WrongPowerState("This TPM engine is closed.")
        if not lib.engine_enter():
            raise EngineBusy("Another call is inside libtpms: it takes one at a time.")
        try:
            yield
        finally:
            lib.engine_leave()

    @contextmanager
    def _powered(self, *, on: bool) -> Iterator[None]:
        with self._entered():
            if self._is_on is not on:
                needed, found = ("on", "off") if on else ("off", "on")
                raise WrongPowerState(f"The TPM is powered {found}; this needs it {needed}.")
            yield

    def _set_state(self, kind: int, blob: Blob, content: bytes) -> None:
        if not content:
            raise DamagedState(blob, "it is empty.")
        result = lib.TPMLIB_SetState(kind, content, len(content))
        if result != _SUCCESS:
            raise DamagedState(blob, f"TPM result {result:#x}.")

    def _power_on(self, complaint: str) -> None:
        lib.engine_store_failed = False
        result = lib.TPMLIB_MainInit()
        self._is_on = True
        if result != _SUCCESS or lib.engine_store_failed:
            self._terminate()
            lib.engine_forget_cached_state()
            self._raise_callback_error()
            _check(result, complaint)
            raise TpmFailed(f"{complaint}: it could not be stored.")

    def _terminate(self) -> None:
        lib.TPMLIB_Terminate()
        self._is_on = False
        self._is_store_lost = False

    def _state(self, kind: int) -> bytes:
        with self._powered(on=True):
            if self._is_store_lost:
                raise TpmFailed("A change could not be stored, so the state in memory is void: resume the stored one.")
            content, size = ffi.new("unsigned char **"), ffi.new("uint32_t *")
            try:
                _check(lib.TPMLIB_GetState(kind, content, size), "libtpms does not give its state out")
                return bytes(ffi.buffer(content[0], size[0]))
            finally:
                lib.TPM_Free(content[0])

    def _raise_process_error(self, result: int) -> None:
        if result == lib.ENGINE_NOT_STORED:
            self._is_store_lost = True
            self._raise_callback_error()
            raise TpmFailed("libtpms stored something that is no permanent state.")
        if result == lib.ENGINE_BUSY:
            raise EngineBusy("Another call is inside libtpms: it takes one at a time.")
        if result == lib.ENGINE_TOO_LONG:
            raise CommandTooLong(f"A TPM command has at most {MAX_COMMAND_BYTES} bytes.")
        if result == lib.ENGINE_CLOSED:
            raise WrongPowerState("This TPM engine is closed.")
        if not self._is_on:
            raise WrongPowerState("The TPM is powered off: manufacture or resume it first.")
        raise TpmFailed(f"libtpms did not execute the command: TPM result {-result:#x}.")

    def _raise_callback_error(self) -> None:
        error, self._callback_error = self._callback_error, None
        if error is not None:
            raise error


_live: Engine | None = None


def _check(result: int, complaint: str) -> None:
    if result != _SUCCESS:
        raise TpmFailed(f"{complaint}: TPM result {result:#x}.")


def _discard(_permanent: bytes) -> None:
    """The store of a TPM that nobody keeps."""


def _set_buffer_size(size_bytes: int) -> BufferSize:
    smallest, largest = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    current = lib.TPMLIB_SetBufferSize(size_bytes, smallest, largest)
    return BufferSize(current, smallest[0], min(largest[0], MAX_COMMAND_BYTES))


@ffi.def_extern(name="engine_on_permanent_state")  # type: ignore[untyped-decorator]
def _on_permanent_state(data: object, length: int) -> bool:
    """libtpms wants the permanent state stored. Python exceptions cannot pass through C: they wait in the engine."""
    engine = _live
    if engine is None:
        return False
    try:
        engine._on_permanent_state(bytes(ffi.buffer(data, length)))
    except BaseException as error:
        engine._callback_error = error
        return False
    return True
