"""What the engine raises. Everyone who handles an engine may come in."""

from __future__ import annotations

from enum import Enum


class Blob(Enum):
    """The two parts of a TPM's state."""

    PERMANENT = "permanent"
    VOLATILE = "volatile"


class EngineError(Exception):
    """Base of what the engine raises itself; what the store callback raised comes through as it was."""


class EngineInUse(EngineError):
    """There is a live engine in this process already."""


class EngineBusy(EngineError):
    """Another call is inside libtpms: of another thread, or the one that called the store callback."""


class WrongPowerState(EngineError):
    """The call needs a TPM that is powered on, or one that is powered off."""


class CommandTooLong(EngineError, ValueError):
    """The command is longer than any TPM command can be; it was not executed."""


class LocalityOutOfRange(EngineError, ValueError):
    """Not a locality from 0 to 4."""


class ProfileRefused(EngineError):
    """libtpms does not know profiles (before 0.10), or not this one."""


class DamagedState(EngineError):
    """libtpms refuses a state blob. The engine is powered off, holds nothing of it, and can try another one.

    Attributes:
        blob: which of the two blobs was refused.
    """

    def __init__(self, blob: Blob, reason: str) -> None:
        super().__init__(f"libtpms refuses the {blob.value} state: {reason}")
        self.blob = blob


class TpmFailed(EngineError):
    """libtpms reported a failure; power the TPM off and resume it from the last stored state."""
