"""`spvtpm agent`: a host's agent, which runs the VMs that a cloud platform orders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from spvtpm.cli.parts import Json, print_json

agent_app = App(name="agent", help="A host's agent: runs the VMs that a cloud platform orders.")

Directory = Annotated[Path, Parameter(help="The agent's directory.")]


@agent_app.command
def init(directory: Directory, /, *, sp: Path, listen: str | None = None, json: Json = False) -> None:
    """Make an agent: its configuration, and a token that the platform has to show.

    Example: spvtpm agent init /var/lib/spvtpm-agent --sp /var/lib/spvtpm-sp --listen 0.0.0.0:7581

    Parameters
    ----------
    sp
        State directory of this host's secure processor.
    listen
        HOST:PORT, or the path of a unix socket. [default: agent.sock in the directory]
    """
    from spvtpm.hypervisor import agent

    os.umask(0o077)
    agent.initialise(directory, sp, listen)
    _tell(directory, json)


@agent_app.command
def address(directory: Directory, /, *, json: Json = False) -> None:
    """Where the platform finds this agent, and which file has the token for it.

    Example: spvtpm agent address /var/lib/spvtpm-agent
    """
    _tell(directory, json)


def _tell(directory: Path, json: bool) -> None:
    from spvtpm.hypervisor import agent

    where, token = agent.address_of(directory), directory.absolute() / "token"
    if json:
        print_json({"address": where, "token_file": str(token)})
    else:
        print(f"agent at {where}, its token in {token}")


@agent_app.command
def run(directory: Directory, /) -> None:
    """Run the agent, until Ctrl-C or SIGTERM; then its VMs are powered off, and its next start boots them again.

    Example: spvtpm agent run /var/lib/spvtpm-agent
    """
    import asyncio
    import logging

    from spvtpm.hypervisor import agent

    os.umask(0o077)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    asyncio.run(agent.serve(directory, lambda where: print(f"listening on {where}", flush=True)))
