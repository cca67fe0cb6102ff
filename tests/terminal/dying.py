"""`python -m tests.terminal.dying N WORD…`: the command line, killed before its N-th step that anybody else could notice.

Such steps are: a file made, synced, linked, moved or removed; a frame sent.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from spvtpm import cli

_steps = 0


def _counted(effect: Callable[..., Any], die_at: int) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        global _steps  # noqa: PLW0603
        _steps += 1
        if _steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return effect(*arguments, **options)

    return counted


def main() -> None:
    """Runs the rest of the command line."""
    die_at = int(sys.argv[1])
    for name in ("fsync", "link", "replace", "rename", "unlink"):
        setattr(os, name, _counted(getattr(os, name), die_at))
    setattr(socket.socket, "sendall", _counted(socket.socket.sendall, die_at))  # noqa: B010
    sys.argv = ["spvtpm", *sys.argv[2:]]
    cli.main()


if __name__ == "__main__":
    main()
