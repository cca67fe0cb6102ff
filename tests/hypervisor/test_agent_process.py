"""An agent's directory, its address, TLS, and one agent at a time."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
from pathlib import Path
from typing import get_args

import httpx
import msgspec
import pytest

from spvtpm.hypervisor.agent import HostAgent, address_of, initialise
from spvtpm.hypervisor.config import AgentConfig, QemuConfig
from spvtpm.wire import agent_api, machine_control
from spvtpm.wire.errors import AlreadyExists, ConfigError, StateInUse, StorageError
from tests.cloud_stack import Daemon, spvtpm
from tests.harness import RunningSp
from tests.hypervisor.running_agent import RunningAgent

_DOCS = Path(__file__).parents[2] / "docs"


def test_over_tcp_with_tls_it_is_reached_by_its_name_and_token(sp: RunningSp) -> None:
    directory = sp.state.parent
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*request, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    options = ("--listen", f"localhost:{port}", "--tls-certificate", certificate, "--tls-key", key)
    spvtpm("agent", "init", directory / "ag", "--sp", sp.state, *options)
    daemon = Daemon(("agent", "run", directory / "ag"), directory / "agent.log")
    daemon.start()
    headers = {"Authorization": f"Bearer {(directory / 'ag' / 'token').read_text()}"}
    trusted = ssl.create_default_context(cafile=str(certificate))

    host = httpx.get(f"https://localhost:{port}/v1/host", headers=headers, verify=trusted)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://localhost:{port}/v1/host", headers=headers)

    assert host.status_code == 200
    assert daemon.stop() == 0


def test_a_second_agent_on_the_same_directory_is_refused(agent: RunningAgent) -> None:
    with pytest.raises(StateInUse):
        HostAgent(agent.directory)


def test_init_replaces_nothing_and_tells_the_address(state_directory: Path) -> None:
    initialise(state_directory, AgentConfig(sp="/sp"))
    token = (state_directory / "token").read_bytes()

    with pytest.raises(AlreadyExists):
        initialise(state_directory, AgentConfig(sp="/other"))

    assert (state_directory / "token").read_bytes() == token
    assert address_of(state_directory) == f"unix:{state_directory}/agent.sock"


@pytest.mark.parametrize(
    ("config", "address"),
    [
        (AgentConfig(sp="/sp", listen="0.0.0.0:7581"), "http://0.0.0.0:7581"),
        (AgentConfig(sp="/sp", listen="[::1]:7581", tls_certificate="/c", tls_key="/k"), "https://[::1]:7581"),
        (AgentConfig(sp="/sp", listen="/run/agent.sock"), "unix:/run/agent.sock"),
    ],
)
def test_an_address_is_as_the_platform_wants_it(state_directory: Path, config: AgentConfig, address: str) -> None:
    initialise(state_directory, config)

    assert address_of(state_directory) == address


@pytest.mark.parametrize(
    "lines",
    [
        "",
        'sp = ""',
        'sp = "/sp"\nmore = 1',
        'sp = "/sp"\nvm_uids = [1]',
        'sp = "/sp"\nvm_uids = [0, 10]',
        'sp = "/sp"\nlisten = "host:port"',
        'sp = "/sp"\ntls_key = "key"',
        'sp = "/sp"\ntls_key = "key"\ntls_certificate = "certificate"',
        "sp = ",
        "\xff",
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(state_directory: Path, lines: str) -> None:
    initialise(state_directory, AgentConfig(sp="/sp"))
    (state_directory / "agent.toml").write_text(lines, encoding="latin-1")

    with pytest.raises(ConfigError):
        HostAgent(state_directory)


def test_a_token_that_others_can_read_is_refused(state_directory: Path) -> None:
    initialise(state_directory, AgentConfig(sp="/sp"))
    (state_directory / "token").chmod(0o644)

    with pytest.raises(StorageError, match="read by others"):
        HostAgent(state_directory)


def test_a_directory_with_a_long_path_is_refused(state_directory: Path) -> None:
    with pytest.raises(ConfigError, match="no room for sockets"):
        initialise(state_directory / ("x" * 60), AgentConfig(sp="/sp"))


def test_every_configuration_key_is_explained_with_its_default() -> None:
    page = (_DOCS / "how-to" / "run-a-host-agent.md").read_text()
    for field in (*msgspec.structs.fields(AgentConfig), *msgspec.structs.fields(QemuConfig)):
        row = re.search(rf"(?m)^\| `{field.name}` \| ([^|]+) \|", page)
        assert row, field.name
        has_default = field.default not in (msgspec.NODEFAULT, "", None) and field.default_factory is msgspec.NODEFAULT
        assert row[1] == (str(field.default) if has_default else "–"), field.name


@pytest.mark.parametrize(
    ("page", "messages"),
    [
        ("agent-api.md", [agent_api.Order, agent_api.HostReport, agent_api.VmReport, agent_api.VmReports]),
        ("machine-control.md", [*get_args(machine_control.ControlRequest), machine_control.MachineState]),
    ],
)
def test_every_message_is_specified(page: str, messages: list[type[msgspec.Struct]]) -> None:
    text = (_DOCS / "formats" / page).read_text()
    for message in messages:
        assert message.__name__ in text
        for field in msgspec.structs.fields(message):
            assert f"`{field.name}`" in text, f"{message.__name__}.{field.name}"
