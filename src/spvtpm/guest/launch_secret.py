"""How a VM gets its key when it boots: from its secure processor, once (`wire/launch_secret.py`)."""

from __future__ import annotations

import socket
from pathlib import Path

from spvtpm.wire.errors import VmKeyError
from spvtpm.wire.launch_secret import MAX_LAUNCH_SECRET_BYTES, LaunchSecret, parse_launch_secret

_PATIENCE_S = 30.0


def take_launch_secret(path: Path) -> LaunchSecret:
    """The VM key and what goes with it; nobody gets it again in this boot.

    Raises:
        VmKeyError: it was taken before, is not for this user, or there is none.
    """
    secret = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(_PATIENCE_S)
            connection.connect(str(path))
            while len(secret) <= MAX_LAUNCH_SECRET_BYTES and (data := connection.recv(MAX_LAUNCH_SECRET_BYTES)):
                secret += data
    except OSError as error:
        raise VmKeyError(f"no launch secret at {path}: {error.strerror or error}") from None
    if not secret:
        raise VmKeyError("the launch secret of this boot was taken before, or is not for this user")
    return parse_launch_secret(secret)
