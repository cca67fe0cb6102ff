"""Where a cloud platform is, and how it is reached: never in clear over a network, unless the owner has said so."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import struct
from dataclasses import dataclass
from urllib.parse import urlsplit

from spvtpm.terminal.owned import MAX_URL_CHARACTERS, Account
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import UsageError
from spvtpm.wire.platform_errors import PlatformUntrusted, Unavailable

_PORTS = {"http": 80, "https": 443}
_NEEDED = "https://HOST[:PORT], http://localhost[:PORT] or unix:/PATH"


@dataclass(frozen=True, slots=True)
class Address:
    """A platform's address, understood.

    Attributes:
        base: what paths are put behind, such as `https://host:8443`.
        host: to connect to; empty for a unix socket.
        port: to connect to.
        path: of the unix socket; empty otherwise.
        is_tls: whether TLS is spoken.
    """

    base: str
    host: str = ""
    port: int = 0
    path: str = ""
    is_tls: bool = False

    def connect(self, timeout_s: float) -> socket.socket:
        """A connection, without TLS; whoever does not take what is sent is not waited for longer than that.

        Raises:
            Unavailable: nobody is there.
        """
        try:
            if self.path:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                try:
                    connection.settimeout(timeout_s)
                    connection.connect(self.path)
                except OSError:
                    connection.close()
                    raise
            else:
                connection = socket.create_connection((self.host, self.port), timeout_s)
        except OSError as error:
            raise Unavailable(f"the platform at {self} does not answer: {error.strerror or error}") from None
        seconds = int(timeout_s)
        limit = struct.pack("ll", seconds, int((timeout_s - seconds) * 1e6))  # Source: socket(7), SO_SNDTIMEO
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        return connection

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else self.base


def parse_address(url: str, *, plain_http: bool = False) -> Address:
    """Reads a platform's address.

    Args:
        url: as its user has typed it.
        plain_http: whether http may be spoken with another machine.

    Raises:
        UsageError: it is no such address, or would have the token cross a network in clear.
    """
    if len(url) > MAX_URL_CHARACTERS or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(f"no address of a platform: give {_NEEDED}")
    if url.startswith("unix:"):
        return _parse_socket(url.removeprefix("unix:"))
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme not in _PORTS:
        raise UsageError(f"{printable(url)} is no address of a platform: give {_NEEDED}")
    if parts.username is not None or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise UsageError(f"an address of a platform is only {_NEEDED}; what follows, or a user's name, has no meaning")
    if parts.scheme == "http" and not plain_http and not _is_this_machine(host):
        raise UsageError(
            f"http would carry your token in clear to {host}: give https, or, where the network is your own, --plain-http"
        )
    written = f"[{host}]" if ":" in host else host
    base = f"{parts.scheme}://{written}" + ("" if port is None else f":{port}")
    return Address(base, host, port or _PORTS[parts.scheme], is_tls=parts.scheme == "https")


def tls_of(account: Account) -> ssl.SSLContext:
    """How the platform's certificate is verified; always.

    Raises:
        PlatformUntrusted: the file of the authorities is missing, or none.
    """
    try:
        return ssl.create_default_context(cafile=account.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it holds no certificate"
        raise PlatformUntrusted(f"the authorities in {account.ca_file} cannot be read: {reason}") from None


def _parse_socket(path: str) -> Address:
    if not path.startswith("/"):
        raise UsageError(f"the path of a unix socket begins with a slash: give {_NEEDED}")
    return Address("http://platform", path=path)


def _is_this_machine(host: str) -> bool:
    """Source: RFC 6761, section 6.3, for the name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
