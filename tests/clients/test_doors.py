"""Every door to a vTPM, with the real tpm2-tools behind it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spvtpm.embedded import VTPM
from spvtpm.wire import messages
from tests.clients.tools import Tools
from tests.harness import RunningSp

SPVTPM = (sys.executable, "-m", "spvtpm.cli")

pytestmark = pytest.mark.claim("C9")


def words_of(sp: RunningSp, vm_id: uuid.UUID, door: str) -> list[str]:
    interface, key = str(sp.interface(vm_id)), str(sp.key_file(vm_id))
    return [*SPVTPM, "guest", door, "--interface", interface, "--key", key]


@contextmanager
def serving(sp: RunningSp, vm_id: uuid.UUID, *where: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A `guest serve` process, and the TCTI string that it prints."""
    command = [*words_of(sp, vm_id, "serve"), *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving swtpm:")
        try:
            yield line.removeprefix("serving ").strip(), process
        finally:
            process.terminate()


def free_port_pair() -> int:
    """A port that is free, as is the next one; somebody else could still take them."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


def assert_works(tools: Tools) -> None:
    """A few commands of each kind."""
    assert len(tools.run("tpm2_getrandom", "8")) == 8
    signs = "sign|userwithauth|sensitivedataorigin"
    tools.run("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc256:ecdsa", "-a", signs, "-c", "key.ctx")
    tools.flush()
    tools.run("tpm2_sign", "-c", "key.ctx", "-g", "sha256", "-f", "plain", "-o", "sig", tools.write("order", b"order"))
    tools.run("tpm2_readpublic", "-Q", "-c", "key.ctx", "-f", "pem", "-o", "key.pem")
    tools.flush()
    tools.run("openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "sig", "order")
    tools.run("tpm2_nvdefine", "-Q", "0x1500001", "-C", "o", "-s", "5", "-a", "ownerread|ownerwrite")
    tools.run("tpm2_nvwrite", "0x1500001", "-C", "o", "-i", "order")
    assert tools.run("tpm2_nvread", "0x1500001", "-C", "o") == b"order"


def test_the_cmd_tcti_starts_a_driver_for_each_command(shared_sp: RunningSp, directory: Path) -> None:
    vm_id = shared_sp.launch()
    tcti = "cmd:" + " ".join(["exec", *words_of(shared_sp, vm_id, "tcti")])

    assert_works(Tools(tcti, directory))


def test_clients_that_follow_each_other_on_the_cmd_tcti_use_one_tpm(shared_sp: RunningSp, directory: Path) -> None:
    vm_id = shared_sp.launch()
    tools = Tools("cmd:" + " ".join(["exec", *words_of(shared_sp, vm_id, "tcti")]), directory)
    tools.run("tpm2_pcrextend", f"7:sha256={'11' * 32}")

    assert tools.pcr(7) == tools.pcr(7) != bytes(32)


def test_a_resident_door_on_a_unix_socket(shared_sp: RunningSp, directory: Path) -> None:
    with serving(shared_sp, shared_sp.launch(), "--socket", str(directory / "tpm")) as (tcti, process):
        assert_works(Tools(tcti, directory))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_the_unix_sockets_are_for_their_user_only(shared_sp: RunningSp, directory: Path) -> None:
    with serving(shared_sp, shared_sp.launch(), "--socket", str(directory / "tpm")):
        assert [(directory / name).stat().st_mode & 0o777 for name in ("tpm", "tpm.ctrl")] == [0o600, 0o600]


def test_a_resident_door_on_tcp(shared_sp: RunningSp, directory: Path) -> None:
    address = f"127.0.0.1:{free_port_pair()}"
    with serving(shared_sp, shared_sp.launch(), "--tcp", address) as (tcti, _process):
        assert_works(Tools(tcti, directory))


def test_many_clients_use_a_resident_door_at_once(shared_sp: RunningSp, directory: Path) -> None:
    with serving(shared_sp, shared_sp.launch(), "--socket", str(directory / "tpm")) as (tcti, _process):
        clients = [Tools(tcti, directory).start("tpm2_getrandom", "--hex", "32") for _ in range(16)]
        answers = [client.communicate(timeout=60) for client in clients]

    assert [client.returncode for client in clients] == [0] * 16, answers
    assert len({output for output, _errors in answers}) == 16


def test_a_resident_door_says_failure_once_its_secure_processor_is_gone(sp: RunningSp, directory: Path) -> None:
    with serving(sp, sp.launch(), "--socket", str(directory / "tpm")) as (tcti, _process):
        tools = Tools(tcti, directory)
        tools.run("tpm2_getrandom", "8")
        sp.kill()

        assert "TPM failure" in tools.refused("tpm2_pcrread", "sha256:7")


def test_a_parked_vtpm_wakes_for_a_client(shared_sp: RunningSp, directory: Path) -> None:
    vm_id = shared_sp.launch()
    with serving(shared_sp, vm_id, "--socket", str(directory / "tpm")) as (tcti, _process):
        tools = Tools(tcti, directory)
        tools.run("tpm2_pcrextend", f"7:sha256={'11' * 32}")
        before = tools.pcr(7)
        shared_sp.call(messages.ParkVtpm(vm_id=vm_id))

        assert tools.pcr(7) == before


@pytest.mark.claim("B8")
def test_the_embedded_vtpm_has_a_tcti(vtpm: VTPM, directory: Path) -> None:
    assert_works(Tools(vtpm.tcti, directory))


@pytest.mark.claim("B8")
def test_an_embedded_vtpm_in_a_directory_is_the_same_tpm_again(directory: Path) -> None:
    read = ("tpm2_nvread", "0x1500001", "-C", "o")
    with VTPM(directory / "state") as tpm:
        tools = Tools(tpm.tcti, directory)
        assert_works(tools)
        tools.run("tpm2_pcrextend", f"7:sha256={'11' * 32}")
        tpm.reset()
        assert tools.pcr(7) == bytes(32)
        assert tools.run(*read) == b"order"
    with VTPM(directory / "state") as tpm:
        assert Tools(tpm.tcti, directory).run(*read) == b"order"
