"""Hosts, users and tokens: for administrators."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from spvtpm.cloud import auth, draining, host_addresses, queries
from spvtpm.cloud.routing import Call, Route
from spvtpm.wire.errors import NotFound, TooMany, WrongState
from spvtpm.wire.platform_api import Drain, Host, HostAddress, MadeToken, NewToken, User


def _hosts(connection: Connection, _: Call) -> list[Host]:
    return queries.list_hosts(connection)


def _set_host(connection: Connection, call: Call) -> Host:
    return host_addresses.set_host(connection, call.path["name"], call.body)


def _remove_host(connection: Connection, call: Call) -> None:
    host_addresses.remove_host(connection, call.path["name"])


def _drain(connection: Connection, call: Call) -> Drain:
    return draining.drain(connection, call.path["name"])


def _end_drain(connection: Connection, call: Call) -> Host:
    return draining.end_drain(connection, call.path["name"])


def _users(connection: Connection, _: Call) -> list[User]:
    return queries.list_users(connection)


def _add_user(connection: Connection, call: Call) -> User:
    return auth.add_user(connection, call.path["name"])


def _remove_user(connection: Connection, call: Call) -> None:
    auth.remove_user(connection, call.path["name"])


def _make_token(connection: Connection, call: Call) -> MadeToken:
    return auth.make_token(connection, call.path["name"], call.body)


def _remove_token(connection: Connection, call: Call) -> None:
    auth.remove_token(connection, call.path["name"], call.path["token_id"])


ADMINISTRATION: Final = (
    Route("GET", "/v1/hosts", "admin", "All hosts, by name.", _hosts, answer=list[Host]),
    Route(
        "PUT",
        "/v1/hosts/{name}",
        "admin",
        "Make a host known, or change how its agent is reached.",
        _set_host,
        writes=True,
        body=HostAddress,
        answer=Host,
    ),
    Route(
        "DELETE",
        "/v1/hosts/{name}",
        "admin",
        "Forget a host without VMs.",
        _remove_host,
        writes=True,
        status=204,
        errors=(NotFound, WrongState),
    ),
    Route(
        "POST",
        "/v1/hosts/{name}/drain",
        "admin",
        "Place no VM at a host any more, and move away those that run there.",
        _drain,
        writes=True,
        answer=Drain,
        errors=(NotFound,),
    ),
    Route(
        "DELETE",
        "/v1/hosts/{name}/drain",
        "admin",
        "Place VMs at a host again.",
        _end_drain,
        writes=True,
        answer=Host,
        errors=(NotFound,),
    ),
    Route("GET", "/v1/users", "admin", "All users, by name.", _users, answer=list[User]),
    Route(
        "PUT", "/v1/users/{name}", "admin", "Make a user; one that is there stays.", _add_user, writes=True, answer=User
    ),
    Route(
        "DELETE",
        "/v1/users/{name}",
        "admin",
        "Remove a user without VMs, and its tokens.",
        _remove_user,
        writes=True,
        status=204,
        errors=(NotFound, WrongState),
    ),
    Route(
        "POST",
        "/v1/users/{name}/tokens",
        "admin",
        "Make a token; its secret is told once, here.",
        _make_token,
        writes=True,
        body=NewToken,
        answer=MadeToken,
        status=201,
        errors=(NotFound, TooMany),
    ),
    Route(
        "DELETE",
        "/v1/users/{name}/tokens/{token_id}",
        "admin",
        "End a token.",
        _remove_token,
        writes=True,
        status=204,
        errors=(NotFound,),
    ),
)
