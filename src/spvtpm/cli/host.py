"""`spvtpm host`: hosts of a running cloud platform, for its administrators. What is done to its database is in `cli/cloud.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from spvtpm.cli.parts import Json, print_json
from spvtpm.cli.platform_parts import at_platform
from spvtpm.cli.terminal_parts import Own
from spvtpm.wire.decoding import printable

if TYPE_CHECKING:
    from spvtpm.terminal.draining import Ends, Line
    from spvtpm.wire.platform_api import Host, Operation

host_app = App(
    name="host",
    help="Hosts of a cloud platform, for its administrators: `spvtpm login URL` with a token that has the scope `admin`.",
)

Name = Annotated[str, Parameter(help="The host's name at the platform.")]
_NO_KEYRING = Own()
_SOMETHING_RUNS = 3


@host_app.command(name=["ls", "list"])
def list_hosts(*, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """List hosts: whether each is online, takes VMs, and how many it has.

    Example: spvtpm host list
    """
    with at_platform(own, json) as site:
        hosts = site.platform.hosts()
    if json:
        print_json(hosts)
        return
    for host in hosts:
        print(_described(host))


@host_app.command
def drain(name: Name, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Empty a host: it takes no VMs any more, and those that run there move to others while they run.

    Example: spvtpm host drain host-1

    Waits for all moves, and tells what became of each VM. What cannot be moved, as its owner forbids it, or as it does not run,
    stays and is named with the reason. Exit code 0: nothing runs there any more; 3: something does. Said again, it goes on with
    what is still there; after Ctrl-C, the moves that have begun go on.
    """
    with at_platform(own, json) as site:
        from spvtpm.terminal.draining import drain

        with _bar(name) as tell:
            lines = drain(site.platform, name, tell)
    if json:
        print_json({"host": name, "is_empty": not any(line.runs for line in lines), "vms": lines})
    else:
        _print_lines(name, lines)
    if any(line.runs for line in lines):
        sys.exit(_SOMETHING_RUNS)


@host_app.command
def undrain(name: Name, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Have a host take VMs again. Those that have moved away stay where they are.

    Example: spvtpm host undrain host-1
    """
    with at_platform(own, json) as site:
        host = site.platform.undrain(name)
    print_json(host) if json else print(_described(host))


def _described(host: Host) -> str:
    state = "online" if host.is_online else f"not online {printable(host.failure)}".rstrip()
    draining = ", takes no VMs: it is being drained" if host.is_draining else ""
    where = f"{host.name}  {printable(host.address)}  {state}{draining}"
    return f"{where}; VMs {host.vms} of {host.max_vms}, chip {host.chip_id or 'unknown'}"


def _print_lines(name: str, lines: Sequence[Line]) -> None:
    width = max((len(line.user) + len(line.name) + 1 for line in lines), default=0)
    for line in lines:
        who = f"{line.user}/{line.name}".ljust(width)
        runs = ", and runs" if line.runs else ""
        print(f"{who}  {line.outcome}{runs}{f': {printable(line.why)}' if line.why else ''}")
    moved, running = sum(line.outcome == "moved" for line in lines), sum(line.runs for line in lines)
    left = len(lines) - moved
    still = f"; {left} there still, of which {running} run" if left else "; it is empty"
    print(f"{name}: {moved} moved away{still}")


@contextmanager
def _bar(name: str) -> Iterator[Ends]:
    """How many moves have ended, on stderr, if a person is there to see it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    words = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True)
    with Progress(
        words, BarColumn(), MofNCompleteColumn(), console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(f"drain {name}", total=None)

        def tell(ended: int, total: int, operation: Operation) -> None:
            described = f"drain {name}: {operation.vm_name}: {printable(operation.step)}"
            bar.update(task, description=described, completed=ended, total=total)

        yield tell
