"""What the owner's commands have in common: options, the keyring, progress, JSON. `cli/terminal.py` comes in."""

from __future__ import annotations

import getpass
import os
import resource
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from spvtpm.cli.parts import print_json
from spvtpm.wire.errors import UsageError

if TYPE_CHECKING:
    from spvtpm.terminal.attestation import Verified
    from spvtpm.terminal.desk import Desk, Wishes
    from spvtpm.terminal.keyring import Keyring
    from spvtpm.terminal.session import Progress
    from spvtpm.wire.owner_messages import MyVm

_ID_BYTES = 16

Vm = Annotated[uuid.UUID, Parameter(help="The VM's id, a UUID.")]
Vtpm = Annotated[
    uuid.UUID, Parameter(help="The vTPM's id, a UUID; `spvtpm terminal status` lists those that are known.")
]


@Parameter(name="*")
@dataclass(frozen=True)
class Own:
    """Where the owner's keyring is.

    Attributes:
        keyring: its directory; otherwise spvtpm in $XDG_DATA_HOME, or in ~/.local/share.
        passphrase_file: a private file with the keyring's passphrase; otherwise it is asked for, if there is one.
    """

    keyring: Annotated[Path | None, Parameter(help="The keyring's directory. [default: ~/.local/share/spvtpm]")] = None
    passphrase_file: Annotated[
        Path | None, Parameter(help="A private file with the keyring's passphrase, if it has one.")
    ] = None

    def directory(self) -> Path:
        """Source: XDG Base Directory Specification, 0.8: a path that is not absolute does not count."""
        if self.keyring is not None:
            return self.keyring
        base = Path(os.environ.get("XDG_DATA_HOME", ""))
        return (base if base.is_absolute() else Path.home() / ".local" / "share") / "spvtpm"

    def open(self) -> Keyring:
        """The keyring. From now on this process leaves no core dump, in which its secrets would be."""
        from spvtpm.terminal.keyring import Keyring

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        return Keyring.open(self.directory(), self.passphrase)

    def passphrase(self) -> bytes:
        from spvtpm.terminal.keyring import read_passphrase

        if self.passphrase_file is not None:
            return read_passphrase(self.passphrase_file)
        return ask_passphrase("Passphrase of the keyring: ")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Towards:
    """Which secure processor, and what it has to be.

    Attributes:
        channel: socket of the relay, or an SP's state directory.
        chip: ids of the chips that will do, in hexadecimal; none: any genuine one.
        minimum_firmware: the oldest version that will do.
        fleet: id of the fleet, in hexadecimal.
    """

    channel: Annotated[Path, Parameter(help="The way to the SP: a socket, or the SP's state directory.")]
    chip: Annotated[
        list[str] | None, Parameter(negative="", help="The id of a chip that will do; may be repeated. [default: any]")
    ] = None
    minimum_firmware: Annotated[int, Parameter(help="The oldest firmware that will do.")] = 0
    fleet: Annotated[str | None, Parameter(help="The id of the fleet that the chip has to be of.")] = None

    def chips(self) -> frozenset[bytes] | None:
        return frozenset(identity(chip, "chip") for chip in self.chip) if self.chip else None

    def wishes(self) -> Wishes:
        from spvtpm.terminal.desk import Wishes

        fleet = None if self.fleet is None else identity(self.fleet, "fleet")
        return Wishes(self.chips(), self.minimum_firmware, fleet)

    def desk(self, own: Own, json: bool = False) -> Desk:
        """The owner's desk at this secure processor; tells on stderr what was verified."""
        from spvtpm.terminal.desk import Desk
        from spvtpm.terminal.socket_relay import through_socket

        tell = tell_verified_as_json if json else tell_verified
        return Desk(own.open(), through_socket(self.channel), self.wishes(), tell)


def identity(text: str, kind: str) -> bytes:
    """16 bytes from hexadecimal."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != _ID_BYTES:
        raise UsageError(f"{text} is no {kind} id: 32 hexadecimal digits")
    return value


def ask_passphrase(prompt: str) -> bytes:
    """From the terminal, unseen."""
    if not Path("/dev/tty").exists() or not sys.stderr.isatty():
        raise UsageError(
            "the keyring has a passphrase, and there is no terminal to ask on: give --passphrase-file FILE"
        )
    return getpass.getpass(prompt).encode()


def as_dict(verified: Verified) -> dict[str, object]:
    return {
        "chip_id": verified.chip_id.hex(),
        "fleet_id": verified.fleet_id.hex(),
        "vendor": verified.vendor,
        "model": verified.model,
        "firmware": verified.firmware,
        "features": verified.feature_names(),
        "revocation_list": verified.revoked.number,
    }


def tell_verified(verified: Verified) -> None:
    print(f"verified: {verified}", file=sys.stderr)


def tell_verified_as_json(verified: Verified) -> None:
    print(msgspec.json.encode({"verified": as_dict(verified)}).decode(), file=sys.stderr)


@contextmanager
def progress_bar(words: str) -> Iterator[Progress]:
    """A bar on stderr, if a person is there to see it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn(words),
        BarColumn(),
        DownloadColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_vms(vms: list[MyVm], json: bool) -> None:
    if json:
        print_json([vm_as_dict(vm) for vm in vms])
        return
    for vm in vms:
        print(f"{vm.vm_id}  {describe_vm(vm)}")


def describe_vm(vm: MyVm) -> str:
    """What a secure processor says of a VM, in words."""
    vtpm = f"vTPM {vm.vtpm_id}, {vm.residency}, version {vm.version}" if vm.vtpm_id else "no vTPM yet"
    return f"{vm.state}, boot {vm.boots}, {vtpm}{f'  {vm.label}' if vm.label else ''}"


def vm_as_dict(vm: MyVm) -> dict[str, object]:
    """What a secure processor says of a VM, as JSON has it."""
    found = msgspec.to_builtins(vm)
    assert isinstance(found, dict)  # noqa: S101  # a struct
    chips = vm.policy.chips
    found["policy"]["chips"] = None if chips is None else sorted(chip.hex() for chip in chips)
    found["policy"]["pcr_banks"] = sorted(vm.policy.pcr_banks)
    return found
