"""`spvtpm cloud`: make and run a cloud platform; its users, tokens and hosts, on its own machine."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import App, Parameter

from spvtpm.cli.parts import Json, print_json
from spvtpm.files import create_file, read_file
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import AlreadyExists, UsageError
from spvtpm.wire.platform_api import HostAddress, MadeToken, Name, NewToken

if TYPE_CHECKING:
    from sqlalchemy import Connection

cloud_app = App(name="cloud", help="The cloud platform: places VMs at hosts, and relays what it cannot read.")

Directory = Annotated[Path, Parameter(help="The platform's directory, made by `spvtpm cloud init`.")]

_MAX_TOKEN_BYTES = 1024
_DAY_S = 86_400


@cloud_app.command
def init(directory: Path, /, *, output: Path | None = None, json: Json = False) -> None:
    """Make a platform on SQLite, and an administrator, `admin`, whose token is shown once.

    Example: spvtpm cloud init /var/lib/spvtpm-cloud

    Parameters
    ----------
    directory
        Made with mode 0700 if it is missing.
    output
        Write the token into this new private file, and do not show it.
    """
    from spvtpm.cloud.founding import found_platform

    os.umask(0o077)
    if output is not None and os.path.lexists(output):
        raise AlreadyExists(f"{output} exists already")
    made = found_platform(directory)
    _write_token(made, output)
    if not json:
        print(f"platform made in {directory}; run it with: spvtpm cloud run {directory}")
    _tell_token(made, output, json=json)


@cloud_app.command
def run(directory: Directory, /, *, replica_id: str | None = None) -> None:
    """Run a replica of the platform in the foreground until SIGTERM or Ctrl-C. The log goes to stderr.

    Example: spvtpm cloud run /var/lib/spvtpm-cloud

    Parameters
    ----------
    replica_id
        Its name among the replicas, the same at each start and no other's; the usual one is made of host name and directory.
    """
    import asyncio
    import logging

    from spvtpm.cloud import service

    os.umask(0o077)
    name = service.replica_id(directory) if replica_id is None else replica_id
    if not (name.isascii() and name.isprintable() and 1 <= len(name) <= 64):
        raise UsageError("a replica's id has 1 to 64 visible characters")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    asyncio.run(service.serve(directory, name, lambda address: print(f"listening on {address}", flush=True)))


@cloud_app.command
def migrate(directory: Directory, /) -> None:
    """Bring the database to the tables of this release. Stop all replicas before.

    Example: spvtpm cloud migrate /var/lib/spvtpm-cloud
    """
    from spvtpm.cloud.migrations import migrate as migrate_database
    from spvtpm.cloud.service import open_database

    os.umask(0o077)
    database = open_database(directory)
    try:
        migrate_database(database)
    finally:
        database.close()
    print("the database has the tables of this release")


@cloud_app.command
def add_user(directory: Directory, name: str, /, *, json: Json = False) -> None:
    """Make a user, without any token; one that is there stays.

    Example: spvtpm cloud add-user /var/lib/spvtpm-cloud alice
    """
    from spvtpm.cloud import auth

    with _writing(directory) as connection:
        user = auth.add_user(connection, _name(name))
    print_json(user) if json else print(f"user {user.name}: tokens {len(user.tokens)}")


@cloud_app.command
def remove_user(directory: Directory, name: str, /) -> None:
    """Remove a user that has no VMs, and its tokens.

    Example: spvtpm cloud remove-user /var/lib/spvtpm-cloud alice
    """
    from spvtpm.cloud import auth

    with _writing(directory) as connection:
        auth.remove_user(connection, _name(name))
    print(f"user {name} removed")


@cloud_app.command
def list_users(directory: Directory, /, *, json: Json = False) -> None:
    """List users and their tokens.

    Example: spvtpm cloud list-users /var/lib/spvtpm-cloud
    """
    from spvtpm.cloud import queries

    with _writing(directory) as connection:
        users = queries.list_users(connection)
    if json:
        print_json(users)
        return
    for user in users:
        print(user.name)
        for token in user.tokens:
            end = "never ends" if token.expires_s is None else f"ends {time.ctime(token.expires_s)}"
            print(f"  {token.token_id}  {', '.join(token.scopes)}; {end}  {token.note}".rstrip())


@cloud_app.command
def new_token(
    directory: Directory,
    user: str,
    /,
    *,
    scope: list[Literal["read", "vms", "admin"]],
    note: str = "",
    days: float | None = None,
    output: Path | None = None,
    json: Json = False,
) -> None:
    """Make a token of a user; it is shown once.

    Example: spvtpm cloud new-token /var/lib/spvtpm-cloud alice --scope vms --output alice.token

    Parameters
    ----------
    scope
        What it allows: `read`: look at one's VMs and at all chips; `vms`: that, and operate them; `admin`: hosts and users.
    note
        What it is for.
    days
        It ends after so many; without this, never.
    output
        Write it into this new private file, and do not show it.
    """
    from spvtpm.cloud import auth

    try:
        ends = None if days is None else time.time() + days * _DAY_S
        new = msgspec.convert({"scopes": sorted(set(scope)), "note": note, "expires_s": ends}, NewToken)
    except (*UNDECODABLE, ValueError) as error:
        raise UsageError(f"such a token cannot be made: {error}") from None
    with _writing(directory) as connection:
        made = auth.make_token(connection, _name(user), new)
        _write_token(made, output)  # before the commit: a token that nobody got is none
    _tell_token(made, output, json=json)


@cloud_app.command
def remove_token(directory: Directory, user: str, token_id: uuid.UUID, /) -> None:
    """End a token.

    Example: spvtpm cloud remove-token /var/lib/spvtpm-cloud alice 0a65f6a5-8a2e-4b0e-8f4e-6a4f2ab6bd59

    Parameters
    ----------
    token_id
        The token's id, as `spvtpm cloud list-users` shows it.
    """
    from spvtpm.cloud import auth

    with _writing(directory) as connection:
        auth.remove_token(connection, _name(user), token_id)
    print(f"token {token_id} ended")


@cloud_app.command
def add_host(directory: Directory, name: str, address: str, /, *, token_file: Path, json: Json = False) -> None:
    """Make a host known, or change how its agent is reached.

    Example: spvtpm cloud add-host /var/lib/spvtpm-cloud host-1 https://host-1.example:7581 --token-file host-1.token

    Parameters
    ----------
    address
        Of its agent: unix:/path, http://host:port or https://host:port.
    token_file
        A private file with the token that the agent wants to hear, as `spvtpm agent init` has made it.
    """
    from spvtpm.cloud import host_addresses

    try:
        token = read_file(token_file, _MAX_TOKEN_BYTES).decode().strip()
        where = msgspec.convert({"address": address, "token": token}, HostAddress)
    except UNDECODABLE:
        raise UsageError(f"{address} is no agent's address, or {token_file} has no token") from None
    with _writing(directory) as connection:
        host = host_addresses.set_host(connection, _name(name), where)
    print_json(host) if json else print(f"host {host.name} at {host.address}")


@cloud_app.command
def remove_host(directory: Directory, name: str, /) -> None:
    """Forget a host where no VM is placed.

    Example: spvtpm cloud remove-host /var/lib/spvtpm-cloud host-1
    """
    from spvtpm.cloud import host_addresses

    with _writing(directory) as connection:
        host_addresses.remove_host(connection, _name(name))
    print(f"host {name} removed")


@cloud_app.command
def list_hosts(directory: Directory, /, *, json: Json = False) -> None:
    """List hosts.

    Example: spvtpm cloud list-hosts /var/lib/spvtpm-cloud
    """
    from spvtpm.cloud import queries

    with _writing(directory) as connection:
        hosts = queries.list_hosts(connection)
    if json:
        print_json(hosts)
        return
    for host in hosts:
        state = "online" if host.is_online else f"not online {host.failure}".rstrip()
        print(
            f"{host.name}  {host.address}  {state}; VMs {host.vms} of {host.max_vms}, chip {host.chip_id or 'unknown'}"
        )


@contextmanager
def _writing(directory: Path) -> Iterator[Connection]:
    from spvtpm.cloud.migrations import verify_migrated
    from spvtpm.cloud.service import open_database

    os.umask(0o077)
    database = open_database(directory)
    try:
        with database.write() as connection:
            verify_migrated(connection)
            yield connection
    finally:
        database.close()


def _name(name: str) -> str:
    try:
        return msgspec.convert(name, Name)
    except UNDECODABLE:
        raise UsageError("a name has 1 to 63 lower-case letters, digits and inner hyphens") from None


def _write_token(made: MadeToken, output: Path | None) -> None:
    if output is not None:
        create_file(output, f"{made.secret}\n".encode())


def _tell_token(made: MadeToken, output: Path | None, *, json: bool) -> None:
    if json:
        print_json(made.token if output is not None else made)
    elif output is not None:
        print(f"token {made.token.token_id} written to {output}")
    else:
        print(f"token {made.token.token_id}, which is shown only now:\n{made.secret}")
