"""Unix sockets as the kernel has them: how long a path may be, and who is at the other end."""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

MAX_SOCKET_PATH_BYTES: Final = 107
"""Source: unix(7): sun_path has 108 bytes, the last one zero."""

_UCRED: Final = struct.Struct("iII")


class Peer(NamedTuple):
    """Process, user and group at the other end of a connection, as they were when it was made."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end of a unix socket. Source: unix(7), SO_PEERCRED."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer._make(_UCRED.unpack(credentials))
