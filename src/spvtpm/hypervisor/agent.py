"""One host's agent: makes its directory, starts, serves, stops. Owns every other part.

Directory, mode 0711 (VMs may have users of their own):

    agent.toml    configuration
    token         what the platform shows; mode 0600
    orders/       what was ordered, a file for each VM
    vms/          VMs' machines
    agent.sock    where the platform connects, unless it is elsewhere; mode 0600
    lock          held while an agent runs
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Final

import uvicorn

from spvtpm.files import create_file
from spvtpm.files.descriptors import raise_descriptor_limit
from spvtpm.files.state_lock import lock_state
from spvtpm.files.unix_sockets import MAX_SOCKET_PATH_BYTES
from spvtpm.hypervisor.conductor import Conductor
from spvtpm.hypervisor.config import AgentConfig, load_config, read_token, write_config
from spvtpm.hypervisor.emulated_vms import EmulatedVms
from spvtpm.hypervisor.qemu_vms import QemuVms
from spvtpm.hypervisor.records import Records
from spvtpm.hypervisor.secure_processor import SecureProcessor
from spvtpm.hypervisor.service import Service
from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.serving.server import OrderlyServer, listen_tcp
from spvtpm.wire.errors import ConfigError, ResourceError, StorageError
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

log = logging.getLogger(__name__)

_LONGEST_SOCKET: Final = f"/vms/{'0' * 36}/machine/control.sock"
_BACKLOG: Final = 128
_MAX_CONNECTIONS: Final = 1024
_LAST_ANSWERS_S: Final = 5
_PING_S: Final = 30.0
_PONG_S: Final = 90.0
"""Longer than a relay waits for one side to take a frame: meanwhile it does not read pongs."""


def initialise(directory: Path, config: AgentConfig) -> None:
    """Makes a new agent's directory: configuration and token.

    Args:
        directory: made if it is missing.
        config: what differs from the defaults.

    Raises:
        AlreadyExists: there is an agent in it.
        ConfigError: its path is too long for the sockets in it, or the configuration makes no sense.
        StorageError: it cannot be written.
    """
    directory = directory.absolute()
    _check_length(directory)
    config.verify()
    try:
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        directory.chmod(0o711)
    except OSError as error:
        raise StorageError(f"cannot make {directory}: {error.strerror}") from None
    create_file(directory / "token", secrets.token_urlsafe(32).encode())
    write_config(directory / "agent.toml", config)


def address_of(directory: Path) -> str:
    """How the platform reaches the agent of a directory, as it is registered there.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    config = load_config(directory / "agent.toml")
    endpoint = config.endpoint()
    if endpoint is None:
        return f"unix:{directory.absolute() / config.listen}"
    return _url(*endpoint, config)


class HostAgent:
    """One running agent. Life: construct (checks everything) → `run()`.

    Args:
        directory: made by `initialise`.

    Raises:
        ConfigError: the configuration cannot be read.
        StateInUse: another agent runs on it.
        StorageError: something in it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        raise_descriptor_limit()
        self._directory = directory.absolute()
        _check_length(self._directory)
        self._config = load_config(self._directory / "agent.toml")
        self._token = read_token(self._directory / "token")
        self._lock = lock_state(self._directory, "agent")

    async def run(self, on_ready: Callable[[str], None]) -> None:
        """Serves until SIGTERM or SIGINT, then powers its VMs off. Not to be called again.

        Args:
            on_ready: told the address once the platform can connect.

        Raises:
            ResourceError: the address cannot be had.
            StorageError: something cannot be read.
        """
        async with AsyncExitStack() as cleanup:
            cleanup.callback(os.close, self._lock)
            listener = cleanup.enter_context(_listen(self._directory, self._config))
            sp = SecureProcessor(self._directory / self._config.sp)
            vms = self._directory / "vms"
            vms.mkdir(mode=0o711, exist_ok=True)
            vms.chmod(0o711)
            first_and_count = self._config.vm_uids
            users = VmUsers(vms, (first_and_count[0], first_and_count[1]) if first_and_count else None)
            records = Records(self._directory / "orders")
            driver = EmulatedVms(vms, users) if self._config.qemu is None else QemuVms(vms, users, self._config.qemu)
            conductor = Conductor(sp, driver, records, self._config.max_vms)
            cleanup.push_async_callback(conductor.close)
            await conductor.start()
            listed = self._directory / self._config.revocation_list if self._config.revocation_list else None
            service = Service(conductor, sp, self._token, listed)
            server = OrderlyServer(
                _uvicorn_config(service, self._config),
                ready=lambda: on_ready(_address(listener, self._config)),
                leaving=conductor.take_no_more,  # those who wait for an order's end are told before they are waited for
            )
            await server.serve(sockets=[listener])
            log.info("stopping: powering VMs off")


def _uvicorn_config(service: Service, config: AgentConfig) -> uvicorn.Config:
    made = uvicorn.Config(
        service.app(),
        http="h11",
        ws="websockets-sansio",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
        ws_max_size=MAX_CHANNEL_FRAME_BYTES,
        ws_per_message_deflate=False,  # ciphertext
        ws_ping_interval=_PING_S,
        ws_ping_timeout=_PONG_S,
        ssl_certfile=config.tls_certificate or None,
        ssl_keyfile=config.tls_key or None,
    )
    try:
        made.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"TLS cannot be had with {config.tls_certificate}: {error.strerror or error}") from None
    return made


def _check_length(directory: Path) -> None:
    longest = MAX_SOCKET_PATH_BYTES - len(os.fsencode(_LONGEST_SOCKET))
    if len(os.fsencode(directory)) > longest:
        raise ConfigError(f"the path {directory} is longer than {longest} bytes: there would be no room for sockets")


@contextmanager
def _listen(directory: Path, config: AgentConfig) -> Iterator[socket.socket]:
    endpoint = config.endpoint()
    path = directory / config.listen
    try:
        listener = _listen_unix(path) if endpoint is None else listen_tcp(*endpoint, _BACKLOG)
    except OSError as error:
        raise ResourceError(f"cannot listen on {config.listen}: {error.strerror or error}") from None
    with listener:
        yield listener
    if endpoint is None:
        path.unlink(missing_ok=True)


def _listen_unix(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of an agent that died; nobody else has this directory
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(old)
    listener.listen(_BACKLOG)
    return listener


def _address(listener: socket.socket, config: AgentConfig) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port, *_more = listener.getsockname()
    return _url(host, port, config)


def _url(host: str, port: int, config: AgentConfig) -> str:
    return f"{'https' if config.tls_certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
