"""What `spvtpm guest tcti` and `spvtpm guest serve` do: connect, start the TPM, serve clients."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spvtpm.guest.crb_driver import CrbDriver
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.guest.tcti import TctiServer, listen_tcp, listen_unix, serve_pipe, unix_paths
from spvtpm.guest.vm_key import read_vm_key
from spvtpm.wire.errors import ResourceError
from spvtpm.wire.tpm_stream import ensure_started


@contextmanager
def _driver(interface: Path, key: Path) -> Iterator[CrbDriver]:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the VM key
    vm_key = read_vm_key(key)
    with InterfaceMemory.connect(interface) as memory:
        driver = CrbDriver(memory, vm_key)
        ensure_started(driver.transmit)
        yield driver


def run_pipe(interface: Path, key: Path) -> None:
    """Serves stdin and stdout until stdin ends.

    Raises:
        SpvtpmError: the interface, the key, or the client's bytes are not what they must be.
    """
    with _driver(interface, key) as driver:
        serve_pipe(driver.transmit, 0, 1)


def run_sockets(interface: Path, key: Path, unix: Path | None, tcp: tuple[str, int] | None) -> None:
    """Serves on a unix or TCP socket until SIGTERM or Ctrl-C.

    Args:
        interface: path of the interface's socket.
        key: path of the VM key.
        unix: path of the unix socket; or
        tcp: host and port.

    Raises:
        SpvtpmError: the interface, the key or the socket cannot be had.
    """
    # Blocked before any thread begins, so that every thread leaves the signals to the wait below.
    ending = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    with _driver(interface, key) as driver:
        where, (data, control) = _listen(unix, tcp)
        server = TctiServer(driver.transmit, driver.cancel, data, control)
        server.start()
        print(f"serving {where}", flush=True)
        signal.sigwait(ending)
        server.close()
    for path in unix_paths(unix) if unix is not None else ():
        path.unlink(missing_ok=True)


def _listen(unix: Path | None, tcp: tuple[str, int] | None) -> tuple[str, tuple[socket.socket, socket.socket]]:
    try:
        if unix is not None:
            return f"swtpm:path={unix.absolute()}", listen_unix(unix)
        assert tcp is not None  # noqa: S101  # the caller gives one of the two
        host, port = tcp
        return f"swtpm:host={host},port={port}", listen_tcp(host, port)
    except OSError as error:
        raise ResourceError(f"cannot listen: {error.strerror}") from None
