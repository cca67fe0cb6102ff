"""A launch secret that names the memory to go on with: for tests in which hibernation stands for the vTPM's way."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from spvtpm.guest.launch_secret import take_launch_secret
from spvtpm.wire.launch_secret import ComingMemory, LaunchSecret


def bound_secret(real: Path, path: Path, memory: ComingMemory) -> Path:
    """A socket that gives the secret of another one, once, and with it which memory belongs to the boot.

    Args:
        real: of the secure processor.
        path: where to listen.
        memory: which it is.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(60)

    def give() -> None:
        with listener, listener.accept()[0] as connection:
            connection.sendall(LaunchSecret(take_launch_secret(real).vm_key, memory).encode())

    threading.Thread(target=give, daemon=True).start()
    return path
