"""A host's agent as a process: its directory, its web server, its VMs. The command line comes in.

agent.toml   configuration
token        what the platform has to show, private
agent.sock   where the platform connects, unless it is told a port
orders/      what was ordered for each VM
vms/         the VMs' machines
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import resource
import secrets
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import uvicorn

from spvtpm.files import create_file, read_file
from spvtpm.hypervisor.conductor import Conductor
from spvtpm.hypervisor.config import DEFAULT_TOML, AgentConfig, load_config
from spvtpm.hypervisor.emulated_vm import EmulatedVms
from spvtpm.hypervisor.records import Records
from spvtpm.hypervisor.secure_processor import SecureProcessor
from spvtpm.hypervisor.service import Service
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.errors import ConfigError, ResourceError, StateInUse, StorageError
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

_MAX_TOKEN_BYTES: Final = 256
_END_S: Final = 5
_KEEP_ALIVE_S: Final = 15
_BACKLOG: Final = 256
_LOUD: Final = ("uvicorn.error", "websockets")
_LONGEST_SOCKET: Final = "/vms/00000000-0000-0000-0000-000000000000/machine/console.sock"
_MAX_SOCKET_PATH_BYTES: Final = 107
"""Source: unix(7), sockaddr_un."""


def initialise(directory: Path, sp: Path, listen: str | None) -> None:
    """Makes an agent's directory: configuration, and a new token. The configuration goes last.

    Raises:
        AlreadyExists: there is one.
        ConfigError: the path is too long for the sockets in it.
        StorageError: it cannot be written.
    """
    directory = directory.absolute()
    if len(os.fsencode(directory)) + len(_LONGEST_SOCKET) > _MAX_SOCKET_PATH_BYTES:
        most = _MAX_SOCKET_PATH_BYTES - len(_LONGEST_SOCKET)
        raise ConfigError(f"the path {directory} is longer than {most} bytes: there would be no room for sockets")
    told = _toml("sp", str(sp.absolute()))
    where = '# listen = "agent.sock"     # a socket\'s path, or HOST:PORT'
    if listen is not None:
        where = _toml("listen", listen)
    try:
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {directory}: {error.strerror}") from None
    if not (directory / "token").exists():
        create_file(directory / "token", secrets.token_urlsafe(32).encode())
    create_file(directory / "agent.toml", DEFAULT_TOML.format(sp=told, listen=where).encode())


def _toml(key: str, text: str) -> str:
    """A text in JSON is one in TOML (1.0, "Basic strings")."""
    return f"{key} = {msgspec.json.encode(text).decode()}"


def address_of(directory: Path) -> str:
    """Where the platform finds the agent: what `spvtpm cloud add-host` wants to know.

    Raises:
        ConfigError: the configuration cannot be read, or makes no sense.
    """
    config = load_config(directory / "agent.toml")
    endpoint = config.endpoint()
    if endpoint is None:
        return f"unix:{directory.absolute() / config.listen}"
    host, port = endpoint
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if config.tls_certificate else 'http'}://{shown}:{port}"


async def serve(directory: Path, listening: Callable[[str], None]) -> None:
    """Runs VMs and serves the platform until SIGTERM or SIGINT; then VMs are powered off.

    Args:
        directory: of the agent.
        listening: told where, once it takes connections.

    Raises:
        ConfigError: the configuration cannot be read, or makes no sense.
        StateInUse: another agent runs there.
        StorageError: something cannot be read or written.
        ResourceError: the address cannot be listened on.
    """
    directory = directory.absolute()
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each machine and each relay has some
    config = load_config(directory / "agent.toml")
    token = read_file(directory / "token", _MAX_TOKEN_BYTES).decode(errors="replace").strip()
    with _alone(directory), _listen(directory, config) as listener:
        uids = (config.vm_uids[0], config.vm_uids[1]) if config.vm_uids else None
        users = VmUsers(directory / "vms", uids)
        sp = SecureProcessor(directory / config.sp)
        conductor = Conductor(sp, EmulatedVms(directory / "vms", users), Records(directory / "orders"), config.max_vms)
        await conductor.start()
        try:
            where = address_of(directory) if config.endpoint() is None else _tcp_address(config, listener)
            await _Server(config, Service(conductor, sp, token), lambda: listening(where)).serve(sockets=[listener])
        finally:
            await conductor.close()


class _Server(uvicorn.Server):
    """uvicorn's, which tells when it is ready, and leaves signals to be signals after it has ended."""

    def __init__(self, config: AgentConfig, service: Service, listening: Callable[[], None]) -> None:
        super().__init__(_uvicorn_config(config, service))
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def _uvicorn_config(config: AgentConfig, service: Service) -> uvicorn.Config:
    made = uvicorn.Config(
        service.app(),
        loop="asyncio",
        http="h11",
        ws="websockets-sansio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_END_S,
        ws_max_size=MAX_CHANNEL_FRAME_BYTES,
        ws_per_message_deflate=False,  # ciphertext
        ssl_certfile=config.tls_certificate or None,
        ssl_keyfile=config.tls_key or None,
    )
    try:
        made.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS cannot be had with {config.tls_certificate}: {error.strerror or error}") from None
    return made


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"cannot open {directory}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateInUse(f"another agent runs in {directory}") from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _listen(directory: Path, config: AgentConfig) -> Iterator[socket.socket]:
    endpoint = config.endpoint()
    try:
        listener = _unix(directory / config.listen) if endpoint is None else _tcp(*endpoint)
    except OSError as error:
        raise ResourceError(f"cannot listen on {config.listen}: {error.strerror or error}") from None
    with listener:
        yield listener
    if endpoint is None:
        (directory / config.listen).unlink(missing_ok=True)


def _unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    path.unlink(missing_ok=True)  # this directory is locked: what is there was left behind
    listener.bind(os.fspath(path))
    path.chmod(0o600)
    listener.listen(_BACKLOG)
    return listener


def _tcp(host: str, port: int) -> socket.socket:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    where: Any = address[:2]
    return socket.create_server(where, family=family, backlog=_BACKLOG)


def _tcp_address(config: AgentConfig, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if config.tls_certificate else 'http'}://{shown}:{port}"
