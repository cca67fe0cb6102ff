"""Who is logged in with a browser: a cookie of 32 random bytes, kept as its SHA-256. The console's routes come in.

A session is good for what its token is good for, and ends with it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from typing import TYPE_CHECKING, Final

from sqlalchemy import delete, insert, select

from spvtpm.cloud import auth
from spvtpm.cloud.tables import console_sessions
from spvtpm.wire.platform_errors import NoSuchToken

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from spvtpm.cloud.auth import Principal

COOKIE: Final = "spvtpm_console"
SESSION_S: Final = 12 * 3600
SESSIONS_PER_TOKEN: Final = 16
"""The oldest ones give way."""

_COOKIE_BYTES: Final = 32
_VALUE: Final = re.compile(r"\A[A-Za-z0-9_-]{43}\Z")  # _COOKIE_BYTES in base64url


def begin(connection: Connection, token: str) -> str:
    """Begins a session; takes those away that are over.

    Returns:
        The cookie's value.

    Raises:
        NoSuchToken: the token is nobody's, or it has ended.
    """
    principal = auth.principal_of(connection, token)
    now_s = time.time()
    connection.execute(delete(console_sessions).where(console_sessions.c.expires_s <= now_s))
    newest = (
        select(console_sessions.c.sha256)
        .where(console_sessions.c.token_id == principal.token_id)
        .order_by(console_sessions.c.expires_s.desc())
        .limit(SESSIONS_PER_TOKEN - 1)
    )
    kept = connection.scalars(newest).all()
    connection.execute(
        delete(console_sessions).where(
            console_sessions.c.token_id == principal.token_id, console_sessions.c.sha256.not_in(kept)
        )
    )
    value = secrets.token_urlsafe(_COOKIE_BYTES)
    connection.execute(
        insert(console_sessions).values(sha256=_sha256(value), token_id=principal.token_id, expires_s=now_s + SESSION_S)
    )
    return value


def find(connection: Connection, value: str | None) -> Principal:
    """Whose session it is.

    Args:
        connection: to the database.
        value: of the cookie; hostile.

    Raises:
        NoSuchToken: there is no such session, or not any more, or its token has ended.
    """
    if value is None or not _VALUE.match(value):
        raise NoSuchToken("nobody is logged in")
    row = connection.execute(select(console_sessions).where(console_sessions.c.sha256 == _sha256(value))).one_or_none()
    if row is None or row.expires_s <= time.time():
        raise NoSuchToken("the session is over")
    return auth.principal_of_token(connection, row.token_id)


def end(connection: Connection, value: str | None) -> None:
    """Ends a session; one that is not there has ended already."""
    if value is not None and _VALUE.match(value):
        connection.execute(delete(console_sessions).where(console_sessions.c.sha256 == _sha256(value)))


def _sha256(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()
