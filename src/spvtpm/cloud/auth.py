"""Users and their tokens: who asks, and what he may. Routes, relay, console and the command line come in.

A token is 32 random bytes, so its SHA-256 tells nothing about it; that alone is kept. There are no passwords.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from spvtpm.cloud import queries
from spvtpm.cloud.tables import tokens, users, vms
from spvtpm.wire.errors import NotFound, TooMany, WrongState
from spvtpm.wire.platform_api import MadeToken, NewToken, Scope, User
from spvtpm.wire.platform_errors import NoSuchToken, ScopeMissing

TOKENS_PER_USER: Final = 100

_TOKEN: Final = re.compile(r"\Aspv_[A-Za-z0-9_-]{43}\Z")
_BEARER: Final = "bearer "
_IMPLIED: Final[dict[Scope, frozenset[Scope]]] = {
    "read": frozenset({"read"}),
    "vms": frozenset({"read", "vms"}),
    "admin": frozenset({"read", "admin"}),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        user: the name.
        token_id: of the token.
        scopes: what the token allows, with what that implies.
        granted: what it says itself.
    """

    user: str
    token_id: uuid.UUID
    scopes: frozenset[Scope]
    granted: tuple[Scope, ...]

    def require(self, scope: Scope) -> None:
        """
        Raises:
            ScopeMissing: the token does not allow it.
        """
        if scope not in self.scopes:
            raise ScopeMissing(f"this needs the scope {scope}, which the token does not have")

    @property
    def sees(self) -> str | None:
        """Whose VMs he may look at, as `queries.py` wants it."""
        return None if "admin" in self.scopes else self.user


def authenticate(connection: Connection, authorization: str | None) -> Principal:
    """Who sends this header `Authorization` (RFC 6750, section 2.1).

    Raises:
        NoSuchToken: it has no token that is known, or not any more.
    """
    if authorization is None or authorization[: len(_BEARER)].lower() != _BEARER:
        raise NoSuchToken("the request has no token")
    return principal_of(connection, authorization[len(_BEARER) :].strip(" "))


def principal_of(connection: Connection, secret: str) -> Principal:
    """Whose token it is.

    Raises:
        NoSuchToken: nobody's, or it has ended.
    """
    if not _TOKEN.match(secret):
        raise NoSuchToken("the request's token is none of this platform")
    row = connection.execute(select(tokens).where(tokens.c.sha256 == _sha256(secret))).one_or_none()
    return _principal(row)


def principal_of_token(connection: Connection, token_id: uuid.UUID) -> Principal:
    """Whose token it is, for a session that was begun with it.

    Raises:
        NoSuchToken: it is not there any more, or has ended.
    """
    return _principal(connection.execute(select(tokens).where(tokens.c.token_id == token_id)).one_or_none())


def _principal(row: Row[Any] | None) -> Principal:
    if row is None:
        raise NoSuchToken("the platform does not know the token")
    if row.expires_s is not None and row.expires_s <= time.time():
        raise NoSuchToken("the token has ended")
    granted: tuple[Scope, ...] = tuple(row.scopes)
    scopes = frozenset[Scope]().union(*(_IMPLIED[scope] for scope in granted))
    return Principal(user=row.user, token_id=row.token_id, scopes=scopes, granted=granted)


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


# Users


def add_user(connection: Connection, name: str) -> User:
    """Makes a user without any token; one that is there stays as it is."""
    if connection.scalar(select(users.c.name).where(users.c.name == name)) is None:
        try:
            with connection.begin_nested():
                connection.execute(insert(users).values(name=name, created_s=time.time()))
        except IntegrityError:
            pass  # somebody else has, just now
    return queries.find_user(connection, name)


def remove_user(connection: Connection, name: str) -> None:
    """Removes a user, and its tokens.

    Raises:
        NotFound: there is none of this name.
        WrongState: it has VMs.
    """
    try:
        with connection.begin_nested():
            if connection.execute(delete(users).where(users.c.name == name)).rowcount == 0:
                raise NotFound(f"there is no user {name}")
    except IntegrityError:
        count = connection.scalar(select(func.count()).where(vms.c.user == name))
        raise WrongState(f"user {name} has VMs: {count}; they have to be destroyed first") from None


def make_token(connection: Connection, user: str, new: NewToken) -> MadeToken:
    """Makes a token; its secret is in the answer, and nowhere else.

    Raises:
        NotFound: there is no user of this name.
        TooMany: the user has so many already.
    """
    known = queries.find_user(connection, user)
    if len(known.tokens) >= TOKENS_PER_USER:
        raise TooMany(f"user {user} has {TOKENS_PER_USER} tokens already")
    secret = "spv_" + secrets.token_urlsafe(32)
    token_id = uuid.uuid4()
    try:
        with connection.begin_nested():
            connection.execute(
                insert(tokens).values(
                    token_id=token_id,
                    user=user,
                    sha256=_sha256(secret),
                    scopes=sorted(set(new.scopes)),
                    note=new.note,
                    created_s=time.time(),
                    expires_s=new.expires_s,
                )
            )
    except IntegrityError:
        raise NotFound(f"there is no user {user}") from None  # any more
    row = connection.execute(select(tokens).where(tokens.c.token_id == token_id)).one()
    return MadeToken(token=queries.token_of(row), secret=secret)


def remove_token(connection: Connection, user: str, token_id: uuid.UUID) -> None:
    """Ends a token.

    Raises:
        NotFound: the user has none of this id.
    """
    gone = connection.execute(delete(tokens).where(tokens.c.token_id == token_id, tokens.c.user == user))
    if gone.rowcount == 0:
        raise NotFound(f"user {user} has no token {token_id}")
