"""A TPM of this machine's kernel, `/dev/tpmN`, for which this process answers: Linux' `tpm_vtpm_proxy`.

Source: Linux, include/uapi/linux/vtpm_proxy.h and Documentation/security/tpm/tpm_vtpm_proxy.rst.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from spvtpm.wire.errors import ResourceError
from spvtpm.wire.tpm_stream import HEADER, TPM_RC_SUCCESS, Transmit, error_response

log = logging.getLogger(__name__)

_NEW_DEVICE: Final = struct.Struct("=IIIII")
"""`struct vtpm_proxy_new_dev`: flags, number of the TPM, descriptor, major, minor."""

_IOC_NEW_DEVICE: Final = 3 << 30 | _NEW_DEVICE.size << 16 | 0xA1 << 8
"""VTPM_PROXY_IOC_NEW_DEV, `_IOWR(0xa1, 0x00, struct vtpm_proxy_new_dev)`."""

_FLAG_TPM2: Final = 1
_SET_LOCALITY: Final = 0x20001000
"""TPM2_CC_SET_LOCALITY: the kernel asks for a locality, in the byte behind the header; its users cannot."""

_TPM_RC_LOCALITY: Final = 0x907
"""Source: TCG TPM 2.0 Library Part 2, table "TPM_RC"."""

_MAX_BYTES: Final = 4096
_LOOK_MS: Final = 50


class KernelTpm:
    """A TPM of the kernel. Life: construct → `serve()` → `close()`, with which it goes.

    Raises:
        ResourceError: the kernel has no such TPMs, or not for this user.
    """

    def __init__(self) -> None:
        try:
            control = os.open("/dev/vtpmx", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ResourceError(
                f"cannot open /dev/vtpmx: {error.strerror}; it needs root, and the kernel's module tpm_vtpm_proxy"
            ) from None
        try:
            made = fcntl.ioctl(control, _IOC_NEW_DEVICE, _NEW_DEVICE.pack(_FLAG_TPM2, 0, 0, 0, 0))
        except OSError as error:
            raise ResourceError(f"the kernel makes no TPM: {error.strerror}") from None
        finally:
            os.close(control)
        _flags, number, self._descriptor, _major, _minor = _NEW_DEVICE.unpack(made)
        self.path = Path(f"/dev/tpm{number}")

    def serve(self, transmit: Transmit, on_ready: Callable[[Path], None], until: int) -> None:
        """Answers for it.

        Args:
            transmit: sends one TPM command; what it raises ends this.
            on_ready: called once, when programs can use it.
            until: a descriptor; returns when it is readable.

        Raises:
            ResourceError: the kernel has given the TPM up.
        """
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(until, select.POLLIN)
        is_ready = False
        while True:
            if not is_ready and self.path.exists():  # the kernel tries it before anybody may have it
                is_ready = True
                on_ready(self.path)
            ready = dict(poll.poll(None if is_ready else _LOOK_MS))
            if until in ready:
                return
            if self._descriptor in ready:
                self._answer(transmit)

    def _answer(self, transmit: Transmit) -> None:
        try:
            command = os.read(self._descriptor, _MAX_BYTES)
        except OSError as error:
            raise ResourceError(f"the kernel has given {self.path} up: {error.strerror}") from None
        response = answer_locality(command) or transmit(command)
        try:
            os.write(self._descriptor, response)
        except OSError as error:  # it has stopped waiting
            log.warning("the kernel did not take the response to a command: %s", error.strerror)

    def close(self) -> None:
        """Takes it away from the kernel."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def answer_locality(command: bytes) -> bytes | None:
    """The answer, if the kernel asks for a locality: 0 is the only one that an interface has."""
    if len(command) < HEADER.size or HEADER.unpack_from(command)[2] != _SET_LOCALITY:
        return None
    return error_response(TPM_RC_SUCCESS if command[HEADER.size :] == b"\0" else _TPM_RC_LOCALITY)
