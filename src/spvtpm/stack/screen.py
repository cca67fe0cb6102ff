"""What a person at the keyboard sees of the stack: what happens, what is up, and what to type next; or one line of JSON."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from spvtpm.stack.places import USER, Places


@dataclass(frozen=True, slots=True)
class Row:
    """A part, as it is shown.

    Attributes:
        name: of the part.
        address: where it listens.
        log: its log.
    """

    name: str
    address: str
    log: Path


@dataclass(frozen=True, slots=True)
class Up:
    """What there is, once it is all up.

    Attributes:
        places: where it lies.
        url: of the platform.
        rows: its parts.
    """

    places: Places
    url: str
    rows: Sequence[Row]


class PersonsScreen:
    """For a person."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def tell(self, sentence: str) -> None:
        """Something has happened."""
        self._console.print(sentence, markup=False)

    def ready(self, up: Up) -> None:
        """All of it is up."""
        table = Table(box=None, pad_edge=False)
        for heading in ("part", "listens on", "log"):
            table.add_column(heading, overflow="fold", header_style="bold")
        for row in up.rows:
            address = row.address.replace(f"{up.places.directory}/", "").replace(f"{up.places.short}/", "")
            table.add_row(row.name, address, str(row.log.relative_to(up.places.directory)))
        self.tell(f"\nin {up.places.directory}:\n")
        self._console.print(table)
        self._console.print("\nIt is up. In another terminal:\n", style="bold")
        self._lines(what_to_type(up))
        self.tell("\nWith a keyring of your own instead:\n")
        self._lines(with_own_keyring(up))
        self.tell(f"\nConsole: {up.url}/console; it asks for a token: yours, or the administrator's, which sees all:\n")
        self._lines([str(up.places.token), str(up.places.admin_token)])
        self.tell("")
        self.tell("Ctrl-C ends it; the next `spvtpm up` goes on where it was.")

    def _lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.tell(f"    {line}")


class ScriptsScreen:
    """For a script: one line of JSON on stdout when all is up; what happens otherwise, on stderr."""

    def tell(self, sentence: str) -> None:
        """Something has happened."""
        print(sentence, file=sys.stderr, flush=True)

    def ready(self, up: Up) -> None:
        """All of it is up."""
        told = {
            "directory": str(up.places.directory),
            "url": up.url,
            "console": f"{up.url}/console",
            "user": USER,
            "token_file": str(up.places.token),
            "admin_token_file": str(up.places.admin_token),
            "data_home": str(up.places.data_home),
            "keyring": str(up.places.keyring),
            "hosts": [{"name": host.name, "sp": str(host.sp), "agent": str(host.agent)} for host in up.places.hosts],
            "parts": [{"name": row.name, "address": row.address, "log": str(row.log)} for row in up.rows],
        }
        print(msgspec.json.encode(told).decode(), flush=True)


def what_to_type(up: Up) -> list[str]:
    """The first commands of its user."""
    program = Path(sys.argv[0]).absolute()
    is_found = shutil.which("spvtpm") is not None
    return [
        *([] if is_found or program.name != "spvtpm" else [f"export PATH={_word(program.parent)}:$PATH"]),
        f"export XDG_DATA_HOME={_word(up.places.data_home)}     # the keyring made for you",
        "spvtpm vm create web",
        "spvtpm vm exec web -- tpm2_pcrread sha256:0",
        "spvtpm vm ls",
    ]


def with_own_keyring(up: Up) -> list[str]:
    """The first commands of a user who has a keyring already."""
    vendor = up.places.vendor
    return [
        f"spvtpm terminal trust {_word(vendor / 'root.pem')} --revoked {_word(vendor / 'revoked.pem')}",
        f"spvtpm login {up.url} --token-file {_word(up.places.token)}",
    ]


def _word(path: Path) -> str:
    return shlex.quote(str(path))
