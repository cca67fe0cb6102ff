"""`spvtpm`: one command group per trust domain, one module each. A door: it sees every domain, and does nothing itself.

Exit codes: 0 done; 2 the command line is wrong; 3 refused; 4 a resource failed (storage, worker, socket); 5 the other side
misbehaved; 130 interrupted; 1 anything else. `vm exec` ends with the code of the command in the VM. An error is told on stderr,
with `--json` as one line of JSON.
"""

from __future__ import annotations

import sys

import msgspec
from cyclopts import App

from spvtpm.cli.agent import agent_app
from spvtpm.cli.cloud import cloud_app
from spvtpm.cli.guest import guest_app
from spvtpm.cli.host import host_app
from spvtpm.cli.hypervisor import hypervisor_app
from spvtpm.cli.login import chips, completion, login, logout
from spvtpm.cli.parts import INTERRUPTED
from spvtpm.cli.secure_processor import sp_app
from spvtpm.cli.terminal import terminal_app
from spvtpm.cli.up import up
from spvtpm.cli.vendor import vendor_app
from spvtpm.cli.vm import vm_app
from spvtpm.wire.errors import PeerError, PolicyError, ResourceError, SpvtpmError, UsageError

GROUPS = (sp_app, hypervisor_app, guest_app, terminal_app, vendor_app, agent_app, cloud_app, host_app, vm_app)
COMMANDS = (up, login, logout, chips, completion)

app = App(
    name="spvtpm",
    help="Virtual TPM 2.0s inside a secure processor. Start with `spvtpm up`, which runs a cloud on this machine.",
)
for group in GROUPS:
    app.command(group)
for command in COMMANDS:
    app.command(command)

_EXIT_CODES = ((UsageError, 2), (PolicyError, 3), (ResourceError, 4), (PeerError, 5), (SpvtpmError, 1))


def main() -> None:
    """Entry point."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SpvtpmError as error:
        if "--json" in sys.argv[1:]:
            told = {"error": error.code, "message": str(error), "hint": error.hint}
            print(msgspec.json.encode(told).decode(), file=sys.stderr)
        else:
            print(f"spvtpm: {error} [{error.code}]\n  {error.hint}", file=sys.stderr)
        sys.exit(next(code for kind, code in _EXIT_CODES if isinstance(error, kind)))
    except OSError as error:  # a full disk, or a pipe whose reader has gone
        sys.stdout = None  # what could not be written is not tried again
        if not isinstance(error, BrokenPipeError):
            print(f"spvtpm: cannot write the output: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
