"""QEMU's monitor, for tests."""

from __future__ import annotations

import json
import socket
from typing import Any


class Qmp:
    """QEMU's monitor. Source: QEMU, docs/interop/qmp-spec."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rw")
        self._file.readline()
        self.do("qmp_capabilities")

    def do(self, command: str, **arguments: object) -> Any:
        """A command; what it returns.

        Raises:
            AssertionError: it was refused.
        """
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            said = json.loads(self._file.readline())
            if "return" in said:
                return said["return"]
            assert "error" not in said, said
