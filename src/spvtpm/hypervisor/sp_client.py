"""Commands to the host's secure processor."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from spvtpm.wire.errors import FrameError, NotRunning, PermissionRefused, ResourceError, error_from_code
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.messages import ErrorReply, ListVms, Reply, Request, VmInfo, VmList, encode_message, parse_reply

_READ_BYTES = 1 << 16


class SecureProcessorClient:
    """A connection to the SP's hypervisor socket.

    Args:
        path: of the socket, or of the SP's state directory, in which it is `run/sp.sock`.
        timeout_s: how long one command may take.

    Raises:
        NotRunning: nobody listens there.
        PermissionRefused: this user may not connect.
    """

    def __init__(self, path: Path, timeout_s: float = 120.0) -> None:
        self._decoder = FrameDecoder()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        if path.is_dir():
            path = path / "run" / "sp.sock"
        try:
            self._socket.connect(str(path))
        except PermissionError:
            self._socket.close()
            raise PermissionRefused(f"this user may not connect to {path}") from None
        except OSError as error:
            self._socket.close()
            raise NotRunning(f"no secure processor answers at {path}: {error.strerror or error}") from None

    def call(self, request: Request) -> Reply:
        """Has one command carried out.

        Raises:
            SpvtpmError: the SP's refusal, as the class its code names.
            ResourceError: the SP is gone, or did not answer in time.
        """
        with suppress(OSError):  # what the SP said before it closed is worth more
            self._socket.sendall(encode_frame(encode_message(request)))
        reply = parse_reply(self._receive())
        if isinstance(reply, ErrorReply):
            raise error_from_code(reply.code, reply.message)
        return reply

    def list_vms(self) -> list[VmInfo]:
        """All VMs by id, page after page.

        Raises:
            as `call`.
        """
        vms: list[VmInfo] = []
        while True:
            page = self.call(ListVms(after=vms[-1].vm_id if vms else None))
            if not isinstance(page, VmList):
                raise ResourceError("the secure processor gave another answer than a list")
            vms += page.vms
            if not page.more or not page.vms:
                return vms

    def _receive(self) -> bytes:
        try:
            while data := self._socket.recv(_READ_BYTES):
                for frame in self._decoder.feed(data):
                    return frame
        except TimeoutError:
            raise ResourceError("the secure processor did not answer in time") from None
        except FrameError:
            raise NotRunning(
                "what answers at this socket is no secure processor, or not its hypervisor's port"
            ) from None
        except OSError as error:
            raise ResourceError(f"the connection to the secure processor broke: {error}") from None
        raise ResourceError("the secure processor closed the connection")

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
