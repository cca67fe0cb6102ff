"""swtpm's command line, as far as it makes sense here. What cannot be done as it was asked for is refused, never passed over.

Source: swtpm(8).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

from spvtpm.wire.errors import UsageError

Startup = Literal["none", "clear", "state"]

_FLAGS = {"not-need-init", "startup-none", "startup-clear", "startup-state", "disable-auto-shutdown"}
_REFUSED = {
    "key": "the state is always sealed; a key of your own has no place",
    "migration_key": "the state never leaves",
    "runas": "start it as that user",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A socket to listen on.

    Attributes:
        path: of a unix socket; None: TCP.
        mode: of the unix socket's file.
        owner: user and group of that, -1: as they are.
        address: to bind TCP to.
        port: of TCP.
        descriptor: of a socket that listens already; -1: none.
    """

    path: Path | None = None
    mode: int | None = None
    owner: tuple[int, int] = (-1, -1)
    address: str = "127.0.0.1"
    port: int = 0
    descriptor: int = -1


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for.

    Attributes:
        state: directory of the TPM's state.
        control: where control requests come in.
        server: where TPM commands come in.
        is_on: whether the TPM is on without INIT.
        startup: the TPM2_Startup that it gets then.
        terminates: whether it ends with its first client.
        daemon: whether it goes into the background.
        pid: file or descriptor for its process id.
        log: file or descriptor for its log; an empty path: no log.
        truncates: whether the log begins anew.
    """

    state: Path
    control: Place | None
    server: Place | None
    is_on: bool
    startup: Startup
    terminates: bool
    daemon: bool
    pid: Path | int | None
    log: Path | int | None
    truncates: bool


class Parser(argparse.ArgumentParser):
    """One that raises."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> Parser:
    parser = Parser(prog="spvtpm-swtpm", description="A TPM 2.0 by swtpm's command line.", allow_abbrev=False)
    parser.add_argument(
        "--version", "-v", action="version", version=f"TPM emulator version {version('spvtpm')}, spvtpm"
    )
    parser.add_argument("interface", choices=["socket"], help="the one way to serve")
    parser.add_argument("--tpm2", action="store_true", help="a TPM 2.0; there is no other")
    parser.add_argument("--tpmstate", metavar="dir=DIR", help="directory of the state; otherwise $TPM_PATH")
    for name, meaning in (("ctrl", "control requests"), ("server", "TPM commands")):
        parser.add_argument(f"--{name}", metavar="type=unixio|tcp,…", help=f"where {meaning} come in")
    parser.add_argument("-p", "--port", type=int, help="TCP port for TPM commands")
    parser.add_argument("--bindaddr", default="127.0.0.1", help="address of that port")
    parser.add_argument("-t", "--terminate", action="store_true", help="end once the client has gone")
    parser.add_argument("-d", "--daemon", action="store_true", help="go into the background once it listens")
    parser.add_argument("--flags", default="", metavar="not-need-init,startup-…", help="be on at once; started, too")
    parser.add_argument("--pid", metavar="file=PATH|fd=FD", help="where its process id goes")
    parser.add_argument("--log", metavar="file=PATH|fd=FD[,truncate]", help="where its log goes")
    parser.add_argument("--locality", metavar="reject-locality-4", help="there is no locality but 0")
    parser.add_argument("--seccomp", metavar="action=…", help="the TPM is always confined")
    for name in _REFUSED:
        parser.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS)
    parser.add_argument("--print-capabilities", action="store_true", help="say what it can, as JSON")
    return parser


def wants_capabilities(words: Sequence[str]) -> bool:
    """Whether only that is asked for."""
    return "--print-capabilities" in words


def parse_options(words: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Reads a command line.

    Args:
        words: without the program's name.
        environment: of the process.

    Raises:
        UsageError: it cannot be done as it was asked for.
    """
    told = _parser().parse_args(words)
    for name, reason in _REFUSED.items():
        if getattr(told, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: {reason}")
    if not told.tpm2:
        raise UsageError("only TPM 2.0: --tpm2 is missing")
    if told.locality not in (None, "reject-locality-4"):
        raise UsageError("--locality: there is no locality but 0")
    flags = {flag for flag in told.flags.split(",") if flag}
    if flags - _FLAGS:
        raise UsageError(f"--flags: not known: {', '.join(sorted(flags - _FLAGS))}")
    startup: Startup = "clear" if "startup-clear" in flags else "state" if "startup-state" in flags else "none"
    server = _place("--server", told.server)
    if told.port is not None:
        server = Place(address=told.bindaddr, port=told.port)
    control = _place("--ctrl", told.ctrl)
    if control is None and server is None:
        raise UsageError("there is nowhere to listen: --ctrl or --server is missing")
    log = _parts("--log", told.log)
    return Options(
        state=_state(told.tpmstate, environment),
        control=control,
        server=server,
        is_on=bool(flags - {"disable-auto-shutdown"}) or control is None,
        startup=startup,
        terminates=told.terminate or "terminate" in _parts("--ctrl", told.ctrl),
        daemon=told.daemon,
        pid=_file("--pid", _parts("--pid", told.pid)),
        log=_file("--log", log),
        truncates="truncate" in log,
    )


def _parts(option: str, told: str | None) -> dict[str, str]:
    """`a=b,c` as a dictionary; a word without a value has an empty one."""
    parts: dict[str, str] = {}
    for part in (told or "").split(","):
        name, _equals, value = part.partition("=")
        if name in parts:
            raise UsageError(f"{option}: {name} is there twice")
        parts[name] = value
    parts.pop("", None)
    return parts


def _number(option: str, told: str, base: int = 10) -> int:
    try:
        return int(told, base)
    except ValueError:
        raise UsageError(f"{option}: {told!r} is no number") from None


def _place(option: str, told: str | None) -> Place | None:
    if told is None:
        return None
    parts = _parts(option, told)
    if "clientfd" in parts or "ifname" in parts:
        raise UsageError(f"{option}: clientfd and ifname are not for this program")
    if "fd" in parts:
        return Place(descriptor=_number(option, parts["fd"]))
    kind = parts.get("type", "tcp")
    if kind == "unixio" and parts.get("path"):
        owner = _number(option, parts.get("uid", "-1")), _number(option, parts.get("gid", "-1"))
        mode = _number(option, parts["mode"], 8) if "mode" in parts else None
        return Place(Path(parts["path"]), mode, owner)
    if kind == "tcp" and "port" in parts:
        return Place(address=parts.get("bindaddr", "127.0.0.1"), port=_number(option, parts["port"]))
    raise UsageError(f"{option}: type=unixio with a path, or type=tcp with a port")


def _state(told: str | None, environment: Mapping[str, str]) -> Path:
    parts = _parts("--tpmstate", told)
    uri = parts.get("backend-uri", "")
    directory = parts.get("dir") or (uri.removeprefix("dir://") if uri.startswith("dir://") else "")
    directory = directory or environment.get("TPM_PATH", "")
    if not directory:
        raise UsageError("--tpmstate dir=DIRECTORY is missing, and $TPM_PATH, too")
    return Path(directory)


def _file(option: str, parts: Mapping[str, str]) -> Path | int | None:
    if "fd" in parts:
        return _number(option, parts["fd"])
    if "file" in parts:
        return Path(os.devnull if parts["file"] == "-" else parts["file"])
    return None
