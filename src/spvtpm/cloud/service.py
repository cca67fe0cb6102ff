"""One replica of the platform as a process: database, web service, work in the background. The command line comes in."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import uvicorn

from spvtpm.cloud.api import build_app
from spvtpm.cloud.config import CloudConfig, database_url, load_config, parse_listen
from spvtpm.cloud.database import Database
from spvtpm.cloud.duties import Duties
from spvtpm.cloud.migrations import verify_migrated
from spvtpm.cloud.platform import Platform
from spvtpm.cloud.slow_clients import protocols
from spvtpm.files.descriptors import raise_descriptor_limit
from spvtpm.serving.server import OrderlyServer, listen_tcp
from spvtpm.wire.errors import ResourceError, StateInUse
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

_KEEP_ALIVE_S: Final = 15
_END_S: Final = 5
_BACKLOG: Final = 512
_MAX_HEADERS_BYTES: Final = 16_384
_MAX_REPLICA_ID: Final = 64  # tables.replicas
_LOUD: Final = ("uvicorn.error", "httpx", "websockets", "alembic")


def open_database(directory: Path) -> Database:
    """The database of the platform in a directory.

    Raises:
        ConfigError: the configuration cannot be read, or makes no sense.
    """
    return Database(database_url(load_config(directory), directory))


def replica_id(directory: Path) -> str:
    """The usual name of the replica in a directory: the same after a restart, and no other's."""
    place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:12]
    return f"{socket.gethostname()[: _MAX_REPLICA_ID - 13]}-{place}"


async def serve(directory: Path, replica: str, listening: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        directory: of the platform.
        replica: this process' name among the replicas, at most 64 characters.
        listening: told where, once it takes connections.

    Raises:
        ConfigError: the configuration cannot be read, or makes no sense.
        NotMigrated: the database has tables of another release.
        Unavailable: the database is away.
        StateInUse: another replica has this directory.
        ResourceError: the address cannot be listened on.
    """
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)
    raise_descriptor_limit()
    config = load_config(directory)
    with ExitStack() as ends:
        ends.enter_context(_alone(directory))
        database = Database(database_url(config, directory))
        ends.callback(database.close)
        with database.read() as connection:
            verify_migrated(connection)
        listener, address = ends.enter_context(_listen(config.listen))
        duties = Duties(database.engine, replica=replica)
        platform = Platform(config, database, wake=duties.wake)
        ends.callback(platform.close)
        duties.start()
        try:
            server = OrderlyServer(
                _uvicorn_config(platform, config),
                ready=lambda: listening(address),
                leaving=platform.leave,  # streams end before they are waited for
            )
            await server.serve(sockets=[listener])
        finally:
            await asyncio.to_thread(duties.close)


def _uvicorn_config(platform: Platform, config: CloudConfig) -> uvicorn.Config:
    http, websocket = protocols(config.limits.patience_s)
    return uvicorn.Config(
        build_app(platform),
        http=http,
        ws=websocket,
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,  # `shell.py` does
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_END_S,
        h11_max_incomplete_event_size=_MAX_HEADERS_BYTES,
        ws_max_size=MAX_CHANNEL_FRAME_BYTES,
        ws_per_message_deflate=False,  # ciphertext
    )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateInUse(f"another replica runs in {directory}") from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _listen(where: str) -> Iterator[tuple[socket.socket, str]]:
    place = parse_listen(where)
    listener, address = _unix_listener(place) if isinstance(place, Path) else _tcp_listener(*place)
    try:
        yield listener, address
    finally:
        listener.close()
        if isinstance(place, Path):
            place.unlink(missing_ok=True)


def _unix_listener(path: Path) -> tuple[socket.socket, str]:
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(os.fspath(path)) == 0:
                    raise ResourceError(f"somebody listens on {path} already")
            path.unlink(missing_ok=True)  # left by one that was killed
        listener.bind(os.fspath(path))
        path.chmod(0o666)  # as with a port, the token decides
        return listener, f"unix:{path}"
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):
            raise ResourceError(f"cannot listen on {path}: {error.strerror}") from None
        raise


def _tcp_listener(host: str, port: int) -> tuple[socket.socket, str]:
    try:
        listener = listen_tcp(host, port, _BACKLOG)
    except OSError as error:
        raise ResourceError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    shown = f"[{host}]" if listener.family == socket.AF_INET6 else host
    return listener, f"http://{shown}:{listener.getsockname()[1]}"
