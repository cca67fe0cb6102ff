"""Whether the vTPM has been on all the time while this system runs.

The host can power a vTPM on anew while its VM runs on; then its PCRs are zero, and whoever measures into them could tell any
story. It can also let VM and vTPM go on together from where they were suspended, which is as if nothing had happened. In both
cases the boot id is another. What tells them apart is the TPM's own word, which the host cannot make up: TPM2_ReadClock fails
in a TPM that was powered on and not started, and every start counts.

Source: TCG TPM 2.0 Library Part 1, section "Timing Components"; Part 2, TPMS_TIME_INFO; Part 3, TPM2_ReadClock.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from spvtpm.files import create_file, read_file
from spvtpm.wire.errors import AlreadyExists, InterfaceError, StorageError
from spvtpm.wire.tpm_stream import HEADER, TPM_RC_INITIALIZE, TPM_RC_SUCCESS, Transmit, ensure_started

RECORD: Final = Path("/run/spvtpm/starts")
"""Lives as long as the running system: /run is kept from the initramfs on, and lost with the memory."""

_READ_CLOCK: Final = bytes.fromhex("80010000000a00000181")
_TIME_INFO: Final = struct.Struct(">QQIIB")
"""time, clock, resetCount, restartCount, safe."""

_STARTS: Final = struct.Struct(">II")
_ANEW: Final = "the vTPM was powered on anew while this system ran: its PCRs say nothing of it any more; boot it again"


def verify_same_boot(transmit: Transmit, record: Path = RECORD) -> None:
    """Starts the TPM, if this system has none yet; otherwise it must be on since then.

    Args:
        transmit: sends one TPM command.
        record: where it is noted which start of the TPM is this system's.

    Raises:
        InterfaceError: it was powered on anew, or does not start.
        StorageError: the note can be neither read nor written.
    """
    noted = _noted(record)
    if noted is None:
        ensure_started(transmit)
    starts = _starts(transmit)
    if starts is None or noted not in (None, starts):
        raise InterfaceError(_ANEW)
    if noted is None:
        _note(record, starts)


def _starts(transmit: Transmit) -> bytes | None:
    """How often it was reset and restarted; None: it was not started since."""
    response = transmit(_READ_CLOCK)
    code = HEADER.unpack_from(response)[2] if len(response) >= HEADER.size else None
    if code == TPM_RC_INITIALIZE:
        return None
    if code != TPM_RC_SUCCESS or len(response) != HEADER.size + _TIME_INFO.size:
        raise InterfaceError("the vTPM does not tell how often it was started")
    _time, _clock, resets, restarts, _safe = _TIME_INFO.unpack_from(response, HEADER.size)
    return _STARTS.pack(resets, restarts)


def _noted(record: Path) -> bytes | None:
    if not record.exists():
        return None
    return read_file(record, _STARTS.size)


def _note(record: Path, starts: bytes) -> None:
    try:
        record.parent.mkdir(mode=0o700, exist_ok=True)
        create_file(record, starts)
    except AlreadyExists:
        raise InterfaceError("another process has begun to use the vTPM at the same time") from None
    except OSError as error:
        raise StorageError(f"cannot make {record.parent}: {error.strerror}") from None
