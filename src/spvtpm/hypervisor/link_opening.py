"""What a host's agent says to its secure processor ahead of a link to another: for which handoff, and which chips are revoked."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Final

from spvtpm.files import read_file
from spvtpm.wire.errors import ConfigError
from spvtpm.wire.migration import MAX_LIST_BYTES, Link, encode_migration

_PEM: Final = re.compile(rb"-----BEGIN X509 CRL-----\s+([A-Za-z0-9+/=\s]+)-----END X509 CRL-----\s*")
"""Source: RFC 7468, section 6."""


def link_opening(handoff: bytes, revocation_list: Path | None) -> bytes:
    """A frame for the migration socket.

    Args:
        handoff: 16 bytes.
        revocation_list: the vendor's newest list, PEM; None: the secure processor knows one.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: it has no such list, or one that is too long. Whether it is the vendor's, the secure processor checks.
    """
    return encode_migration(Link(handoff, b"" if revocation_list is None else _read_list(revocation_list)))


def _read_list(path: Path) -> bytes:
    found = _PEM.fullmatch(read_file(path, 2 * MAX_LIST_BYTES, private=False))
    if found is None:
        raise ConfigError(f"{path} has no list of revoked chips in PEM")
    try:
        der = base64.b64decode(b"".join(found[1].split()), validate=True)
    except binascii.Error:
        raise ConfigError(f"{path} has no list of revoked chips in PEM") from None
    if not 0 < len(der) <= MAX_LIST_BYTES:
        raise ConfigError(f"the list of revoked chips in {path} is longer than {MAX_LIST_BYTES} bytes")
    return der
