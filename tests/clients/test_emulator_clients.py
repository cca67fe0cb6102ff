"""Real TPM clients on the TPM emulator interface of a secure processor: what they say reaches it as QEMU would bring it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tpm2_pytss import ESAPI  # type: ignore[import-untyped]

from spvtpm.guest.tcti import TctiServer, listen_unix
from spvtpm.wire import messages
from spvtpm.wire.tpm_stream import ensure_started
from tests.clients.test_doors import assert_works
from tests.clients.test_pytss import SIGNING
from tests.clients.tools import Tools
from tests.emulator_client import CMD_CANCEL_TPM_CMD, EmulatorClient
from tests.harness import RunningSp

pytestmark = pytest.mark.claim("B1")


@contextmanager
def attached(sp: RunningSp, directory: Path, *, parks: bool = False) -> Iterator[str]:
    """The TCTI string of a new VM on this interface; its vTPM is parked after every command, if that is wanted."""
    vm_id, path = sp.launch_emulated()
    lock = threading.Lock()
    with EmulatorClient(path) as client:
        client.attach()

        def transmit(command: bytes) -> bytes:
            with lock:
                response = client.transmit(command)
                if parks:
                    sp.info(messages.ParkVtpm(vm_id=vm_id))
                return response

        def cancel() -> None:
            client.do(CMD_CANCEL_TPM_CMD)

        ensure_started(transmit)
        server = TctiServer(transmit, cancel, *listen_unix(directory / "tpm"))
        server.start()
        try:
            yield f"swtpm:path={directory}/tpm"
        finally:
            server.close()
    sp.destroy(vm_id)


@pytest.mark.parametrize("parks", [False, True])
def test_tpm2_tools_work(shared_sp: RunningSp, directory: Path, parks: bool) -> None:
    with attached(shared_sp, directory, parks=parks) as tcti:
        assert_works(Tools(tcti, directory))


def test_tpm2_pytss_works(shared_sp: RunningSp, directory: Path) -> None:
    with attached(shared_sp, directory) as tcti, ESAPI(tcti) as esapi:
        parent = esapi.create_primary(None, "ecc")[0]
        private, public, *_ = esapi.create(parent, None, SIGNING)
        key = esapi.load(parent, private, public)
        name = esapi.read_public(key)[1]
        saved = esapi.context_save(key)
        esapi.flush_context(key)
        assert bytes(esapi.read_public(esapi.context_load(saved))[1]) == bytes(name)
