"""`spvtpm-swtpm`: a TPM for programs that start swtpm by its command line, with the clients that those have."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tpm2_pytss import ESAPI  # type: ignore[import-untyped]

from tests import emulator_client as swtpm
from tests import tpm_commands as tpm
from tests.clients.test_doors import assert_works, free_port_pair
from tests.clients.tools import Tools
from tests.emulator_client import EmulatorClient
from tests.harness import has_ended
from tests.swtpm_process import RunningSwtpm

SPVTPM_SWTPM = (sys.executable, "-m", "spvtpm.swtpm")

pytestmark = pytest.mark.claim("B1")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SPVTPM_SWTPM, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)


def end(pid_file: Path) -> None:
    """SIGTERM to a daemon; waits for its end."""
    pid = int(pid_file.read_text())
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    assert has_ended(process)


@pytest.fixture
def daemon(directory: Path) -> Iterator[str]:
    """The TCTI string of one in the background, started as test-suites do."""
    port, pid_file = free_port_pair(), directory / "pid"
    words = (
        f"socket --tpm2 --tpmstate dir={directory}/state --server type=tcp,port={port} --ctrl type=tcp,port={port + 1} "
        f"--flags not-need-init,startup-clear --pid file={pid_file} --log file={directory}/log,level=5 "
        "--seccomp action=none --daemon"
    )
    begun = run(*words.split())
    assert begun.returncode == 0, begun.stderr
    yield f"swtpm:host=127.0.0.1,port={port}"
    end(pid_file)
    assert not pid_file.exists()


def test_tools_work_on_its_tcp_ports(daemon: str, directory: Path) -> None:
    assert_works(Tools(daemon, directory))


def test_tools_and_library_share_it(daemon: str, directory: Path) -> None:
    with ESAPI(daemon) as esapi:
        assert len(bytes(esapi.get_random(8))) == 8
        assert len(Tools(daemon, directory).run("tpm2_getrandom", "8")) == 8
        assert len(bytes(esapi.get_random(8))) == 8


def test_unix_sockets_and_a_state_that_lasts(directory: Path) -> None:
    more = ("--server", f"type=unixio,path={directory}/tpm,mode=0600", "--flags", "startup-clear")
    (directory / "tpm.ctrl").symlink_to(directory / "control")
    tools = Tools(f"swtpm:path={directory}/tpm", directory)
    with RunningSwtpm(directory, SPVTPM_SWTPM, more):
        assert (directory / "tpm").stat().st_mode & 0o777 == 0o600
        assert_works(tools)
        tools.run("tpm2_pcrextend", f"7:sha256={'11' * 32}")
    with RunningSwtpm(directory, SPVTPM_SWTPM, more):
        assert tools.run("tpm2_nvread", "0x1500001", "-C", "o") == b"order"
        assert tools.pcr(7) == bytes(32)


def test_as_qemu_and_libvirt_use_it(directory: Path) -> None:
    running = RunningSwtpm(directory, SPVTPM_SWTPM, ("--terminate",))
    with running as control:
        with EmulatorClient(control) as client:
            assert client.do(swtpm.CMD_INIT, bytes(4)) == swtpm.TPM_BAD_ORDINAL, "there is no data channel"
            client.attach()
            tpm.checked(client.transmit(tpm.startup()))
            tpm.checked(client.transmit(tpm.get_random(8)))
            with EmulatorClient(control) as other:
                assert other.do(swtpm.CMD_GET_CONFIG) == swtpm.TPM_SUCCESS
            assert client.do(swtpm.CMD_STOP) == client.init() == swtpm.TPM_SUCCESS
            assert tpm.response_code(client.transmit(tpm.get_random(8))) == tpm.RC_INITIALIZE
        assert running.process.wait(swtpm.PATIENCE_S) == 0, "its only client has gone"


def test_shutdown_ends_it(directory: Path) -> None:
    running = RunningSwtpm(directory, SPVTPM_SWTPM)
    with running as control, EmulatorClient(control) as client:
        client.attach()
        assert client.do(swtpm.CMD_SHUTDOWN) == swtpm.TPM_SUCCESS
        assert running.process.wait(swtpm.PATIENCE_S) == 0
    assert not control.exists()


@pytest.mark.skipif(shutil.which("swtpm_ioctl") is None, reason="swtpm_ioctl is not installed (package swtpm-tools)")
def test_swtpms_own_tool_controls_it(directory: Path) -> None:
    more = ("--server", f"type=unixio,path={directory}/tpm")
    running = RunningSwtpm(directory, SPVTPM_SWTPM, more)
    with running as control:
        for words in ("-c", "-i", "-e", "-l 0", "-C", "--stop", "-b 3968", "-i", "-s"):
            done = subprocess.run(
                ["swtpm_ioctl", "--unix", str(control), *words.split()], capture_output=True, text=True
            )
            assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert running.process.wait(swtpm.PATIENCE_S) == 0
        refused = subprocess.run(["swtpm_ioctl", "--unix", str(control), "-v"], capture_output=True)
        assert refused.returncode != 0


def test_it_says_what_it_can() -> None:
    told = json.loads(run("socket", "--tpm2", "--print-capabilities").stdout)
    assert told["type"] == "swtpm"
    assert "tpm-2.0" in told["features"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--ctrl", "type=unixio,path=c"), "--tpm2 is missing"),
        (("--tpm2",), "nowhere to listen"),
        (("--tpm2", "--ctrl", "type=unixio"), "type=unixio with a path"),
        (("--tpm2", "--ctrl", "type=tcp,port=x"), "no number"),
        (("--tpm2", "--ctrl", "type=unixio,path=c", "--key", "file=k"), "always sealed"),
        (("--tpm2", "--ctrl", "type=unixio,path=c", "--locality", "allow-set-locality"), "no locality but 0"),
        (("--tpm2", "--ctrl", "type=unixio,path=c", "--flags", "no-such"), "not known: no-such"),
        (("--tpm2", "--no-such"), "unrecognized"),
    ],
)
def test_what_it_cannot_do_as_asked_it_refuses(directory: Path, words: tuple[str, ...], complaint: str) -> None:
    done = run("socket", "--tpmstate", f"dir={directory}/state", *words)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert not (directory / "state").exists()


def test_a_state_of_swtpms_is_no_reason_to_begin_anew(directory: Path) -> None:
    (directory / "tpm2-00.permall").write_bytes(b"state")
    done = run("socket", "--tpm2", "--tpmstate", f"dir={directory}", "--ctrl", f"type=unixio,path={directory}/c")
    assert (done.returncode, "only swtpm can read" in done.stderr) == (1, True)


# spvtpm-swtpm-setup


def set_up(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spvtpm.swtpm.setup", "--tpm2", "--tpm-state", f"{directory}/state", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_makes_a_tpm_with_endorsement_keys_and_says_that_nobody_certifies_them(directory: Path) -> None:
    done = set_up(
        directory, "--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--vmid", "vm:1"
    )
    assert (done.returncode, "no certificates" in done.stderr) == (0, True)
    more = ("--server", f"type=unixio,path={directory}/tpm", "--flags", "startup-clear")
    (directory / "tpm.ctrl").symlink_to(directory / "control")
    tools = Tools(f"swtpm:path={directory}/tpm", directory)
    with RunningSwtpm(directory, SPVTPM_SWTPM, more):
        assert tools.run("tpm2_getcap", "handles-persistent").split() == [b"-", b"0x81010001", b"-", b"0x81010016"]
        tools.run("tpm2_createek", "-Q", "-c", "ek.ctx", "-G", "rsa", "-u", "made.pub")
        tools.run("tpm2_readpublic", "-Q", "-c", "0x81010001", "-o", "kept.pub")
        assert tools.read("made.pub") == tools.read("kept.pub"), "it is the standard one"
        assert "another process uses" in set_up(directory, "--overwrite").stderr


def test_a_tpm_that_is_there_stays_unless_it_is_to_be_overwritten(directory: Path) -> None:
    store = directory / "state" / "root-key"
    assert set_up(directory).returncode == 0
    made = store.read_bytes()
    assert "--overwrite makes another" in set_up(directory).stderr
    assert set_up(directory, "--not-overwrite").returncode == 0
    assert store.read_bytes() == made
    assert set_up(directory, "--overwrite").returncode == 0
    assert store.read_bytes() != made
    assert "unrecognized" in set_up(directory, "--pwdfile-fd", "3").stderr
