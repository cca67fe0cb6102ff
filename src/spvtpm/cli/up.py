"""`spvtpm up`: the whole on one machine, in one command."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from spvtpm.cli.parts import Json
from spvtpm.wire.errors import UsageError

_EXTRA = ("alembic", "dbos", "httpx", "sqlalchemy", "starlette", "uvicorn", "websockets")
_LAST_PORT = 65_535


def up(directory: Path | None = None, /, *, port: int = 7580, json: Json = False) -> None:
    """Run a cloud on this machine: a platform, and two hosts with a secure processor each. Ctrl-C ends it in order.

    Example: spvtpm up

    What is missing is made: a vendor, chips, a first user with a token and a keyring. The next start goes on where the last one
    ended: VMs that ran are booted again.

    Parameters
    ----------
    directory
        Where it is kept. [default: ~/.local/share/spvtpm-cloud]
    port
        Where the platform listens, on this machine alone; another one, if somebody has it.
    """
    missing = [module for module in _EXTRA if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this needs what a base installation leaves out ({missing[0]}): pip install 'spvtpm[platform]'"
        )
    from spvtpm.stack.running import run_stack
    from spvtpm.stack.screen import PersonsScreen, ScriptsScreen

    if not 1 <= port <= _LAST_PORT:
        raise UsageError(f"{port} is no port: 1 to {_LAST_PORT}")
    run_stack(directory or _default(), ScriptsScreen() if json else PersonsScreen(), port)


def _default() -> Path:
    """Source: XDG Base Directory Specification, 0.8: a path that is not absolute does not count."""
    from spvtpm.stack.places import is_data_home

    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    if base.is_absolute() and is_data_home(base):
        return base.parent  # said where it was told to be said: it is this cloud that is meant, not one inside it
    return (base if base.is_absolute() else Path.home() / ".local" / "share") / "spvtpm-cloud"
