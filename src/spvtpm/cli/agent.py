"""`spvtpm agent`: a host's hypervisor agent, which runs VMs as the cloud platform orders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from spvtpm.cli.parts import Json, print_json
from spvtpm.wire.errors import UsageError

agent_app = App(name="agent", help="A host's hypervisor agent, which runs VMs as the cloud platform orders.")

Directory = Annotated[Path, Parameter(help="The agent's directory.")]


@agent_app.command
def init(
    directory: Directory,
    /,
    *,
    sp: Path,
    listen: str = "agent.sock",
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    max_vms: int = 256,
    vm_uids: str | None = None,
    revocation_list: Path | None = None,
    json: Json = False,
) -> None:
    """Make a new agent: configuration, and the token that the platform shows.

    Example: spvtpm agent init /var/lib/spvtpm-agent --sp /var/lib/spvtpm

    Parameters
    ----------
    sp
        State directory of the host's secure processor.
    listen
        Where the platform connects: a socket's path, or HOST:PORT.
    tls_certificate
        With HOST:PORT: a file with certificate and chain, PEM.
    tls_key
        With HOST:PORT: a private file with its key, PEM.
    max_vms
        How many VMs the host takes.
    vm_uids
        User ids that belong to VMs, FIRST:COUNT. [default: VMs run as the agent's user]
    revocation_list
        The vendor's newest list of revoked chips, PEM: VMs move between hosts only with it. It may be replaced at any time.
    """
    from spvtpm.hypervisor.agent import initialise
    from spvtpm.hypervisor.config import AgentConfig

    config = AgentConfig(
        sp=str(sp.absolute()),
        listen=listen,
        tls_certificate=str(tls_certificate.absolute()) if tls_certificate else "",
        tls_key=str(tls_key.absolute()) if tls_key else "",
        max_vms=max_vms,
        vm_uids=_parse_uids(vm_uids),
        revocation_list=str(revocation_list.absolute()) if revocation_list else "",
    )
    initialise(directory, config)
    _tell(directory, json)


def _parse_uids(text: str | None) -> list[int]:
    if text is None:
        return []
    numbers = text.split(":")
    if len(numbers) != 2 or not all(number.isascii() and number.isdecimal() and len(number) < 11 for number in numbers):
        raise UsageError(f"{text} are no user ids: FIRST:COUNT")
    return [int(number) for number in numbers]


@agent_app.command
def run(directory: Directory, /) -> None:
    """Run the agent in the foreground until SIGTERM or Ctrl-C, which power its VMs off. The log goes to stderr.

    Example: spvtpm agent run /var/lib/spvtpm-agent
    """
    import asyncio
    import logging

    from spvtpm.hypervisor.agent import HostAgent

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    agent = HostAgent(directory)
    asyncio.run(agent.run(lambda address: print(f"listening on {address}", flush=True)))


@agent_app.command
def address(directory: Directory, /, *, json: Json = False) -> None:
    """Show how the platform reaches the agent, and which file has the token for it.

    Example: spvtpm agent address /var/lib/spvtpm-agent
    """
    _tell(directory, json)


def _tell(directory: Path, json: bool) -> None:
    from spvtpm.hypervisor.agent import address_of

    found, token_file = address_of(directory), str(directory.absolute() / "token")
    if json:
        print_json({"address": found, "token_file": token_file})
    else:
        print(f"agent at {found}, its token in {token_file}")
