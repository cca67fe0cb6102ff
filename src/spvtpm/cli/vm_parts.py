"""What the commands of `spvtpm vm` have in common: options, words, a command's streams. `cli/vm.py` comes in."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import Parameter

from spvtpm.cli.parts import print_json
from spvtpm.cli.terminal_parts import as_dict, describe_vm, identity, vm_as_dict
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import MessageError, UsageError

if TYPE_CHECKING:
    from spvtpm.terminal.exports import Exported
    from spvtpm.terminal.machines import Site
    from spvtpm.terminal.migration import Moved
    from spvtpm.terminal.overview import Comparison, Line
    from spvtpm.terminal.owned import OwnedVm
    from spvtpm.wire.instance_content import Policy
    from spvtpm.wire.platform_api import Vm

_MAX_QUIET_BYTES = 1 << 24


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NewVm:
    """How a new vTPM shall be, besides what is wished of its chip.

    Attributes:
        label: the owner's words.
        no_migration: never handed to another SP while it runs.
        emulator: it may be reached by the TPM emulator interface, too.
        pcr_bank: names of its PCR banks.
    """

    label: Annotated[str, Parameter(help="Your words for the vTPM, up to 256 characters.")] = ""
    no_migration: Annotated[
        bool, Parameter(negative="", help="Policy: it is never handed to another secure processor while it runs.")
    ] = False
    emulator: Annotated[
        bool,
        Parameter(negative="", help="Policy: QEMU may attach it as a TPM emulator; the host sees all commands then."),
    ] = False
    pcr_bank: Annotated[
        list[str] | None,
        Parameter(negative="", help="Policy: a PCR bank that it has, such as sha256; may be repeated."),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Where a VM may be.

    Attributes:
        chip: ids of the chips that will do, in hexadecimal; none: any.
        minimum_firmware: the oldest version that will do.
        fleet: id of the fleet, in hexadecimal.
        host: the one host that will do.
    """

    chip: Annotated[
        list[str] | None,
        Parameter(negative="", help="Policy: the id of a chip that will do; may be repeated. [default: any]"),
    ] = None
    minimum_firmware: Annotated[int, Parameter(help="Policy: the oldest firmware that will do.")] = 0
    fleet: Annotated[str | None, Parameter(help="The id of the fleet that the chip has to be of.")] = None
    host: Annotated[str | None, Parameter(help="The platform's host that will do. [default: any]")] = None

    def owned(self, name: str, new: NewVm) -> OwnedVm:
        """A VM of this name, with a new id and a new key."""
        from spvtpm.terminal.owned import OwnedVm
        from spvtpm.wire.platform_api import Name

        policy = {
            "migration_allowed": not new.no_migration,
            "chips": [identity(chip, "chip") for chip in self.chip] if self.chip else None,
            "minimum_firmware": self.minimum_firmware,
            "direct_path_only": not new.emulator,
            "pcr_banks": new.pcr_bank or [],
        }
        try:
            msgspec.convert(name, Name)
        except msgspec.ValidationError:
            raise UsageError("a VM's name has 1 to 63 lower-case letters, digits and inner hyphens") from None
        told = {
            "name": name,
            "vm_id": uuid.uuid4(),
            "vm_key": os.urandom(32),
            "policy": policy,
            "label": new.label,
            "fleet_id": None if self.fleet is None else identity(self.fleet, "fleet"),
            "host": self.host,
        }
        try:
            return msgspec.convert(told, OwnedVm)
        except msgspec.ValidationError as error:
            raise UsageError(f"no such VM: {error}") from None


def print_moved(name: str, moved: Moved, json: bool) -> None:
    if json:
        told = {"name": name, "has_moved": moved.has_moved, "was_cancelled": moved.was_cancelled, "host": moved.host}
        told |= {"chip_id": moved.chip_id.hex(), "source_chip_id": moved.source.hex(), "source_says": moved.source_says}
        print_json({**told, "vm": vm_as_dict(moved.here)})
        return
    where = f"{name} runs at the chip {moved.chip_id.hex()}"
    host = f" ({moved.host}, as the platform says)" if moved.host is not None else ""
    if not moved.has_moved:
        print(f"{'cancelled: ' if moved.was_cancelled else ''}{where}{host}, where it was")
        return
    answers = {"migrated": "confirms that it has given its vTPM away", "nothing": "does not answer"}
    source = answers.get(moved.source_says, f"says of its vTPM: {moved.source_says}")
    print(f"{'too late to cancel it: ' if moved.was_cancelled else ''}{where}{host} now")
    print(f"the chip {moved.source.hex()}, where it was, {source}")


def print_exported(name: str, exported: Exported, json: bool) -> None:
    if json:
        told = {"name": name, "vtpm_id": str(exported.known.vtpm_id), "version": exported.file.version}
        print_json({**told, "path": exported.file.path, "sha256": exported.file.sha256.hex()})
    else:
        print(f"the vTPM of {name} lives in {exported.file.path} now, as version {exported.file.version}")


def print_lines(lines: Sequence[Line], json: bool) -> None:
    if json:
        print_json([_line_as_dict(line) for line in lines])
        return
    if not lines:
        print("no VM yet; `spvtpm vm create NAME` makes one", file=sys.stderr)
    for line in lines:
        print(f"{line.name}  {_said(line.says)}")
        _print_differences(line)


def print_comparison(found: Comparison, json: bool) -> None:
    from spvtpm.terminal.whereabouts import describe

    line = found.line
    if json:
        told = _line_as_dict(line)
        told["secure_processor_says"] = None if found.here is None else vm_as_dict(found.here)
        told["chip"] = None if found.chip is None else as_dict(found.chip)
        silence = found.silence
        told["silence"] = None if silence is None else {"error": silence.code, "message": str(silence)}
        print_json(told)
        return
    print(f"{line.name}  {line.owned.vm_id if line.owned else ''}")
    print(f"  the platform says: {_said(line.says)}")
    place = "no vTPM yet" if line.known is None else f"vTPM {line.known.vtpm_id} {describe(line.known.place)}"
    print(f"  your keyring knows: {place}")
    if found.here is not None:
        print(f"  its secure processor says: {describe_vm(found.here)}")
        print(f"  its policy: {_policy(found.here.policy)}")
    if found.silence is not None:
        print(f"  its secure processor could not be asked: {found.silence}")
    if line.says is not None and line.says.pcrs is not None:
        read = datetime.fromtimestamp(line.says.pcrs.read_s, UTC)
        print(f"  published PCRs of {read:%Y-%m-%d %H:%M:%S}: {', '.join(sorted(line.says.pcrs.banks))}")
    _print_differences(line)


def print_events(site: Site, name: str, json: bool) -> None:
    from spvtpm.terminal.following import locate, said_chip

    owned = site.keyring.owned(name)
    found = [("platform", event.time_s, event.what, event.detail) for event in site.platform.events(owned.vm_id)]
    chip_id = locate(site, owned, said_chip(site, owned))
    if chip_id is not None:
        seen = site.desk(chip_id).events(owned.vm_id)
        found += [("secure processor", float(event.time_s), event.what, event.detail) for event in seen]
    found.sort(key=lambda event: event[1])
    if json:
        names = ("by", "time_s", "what", "detail")
        print_json([dict(zip(names, event, strict=True)) for event in found])
        return
    for by, time_s, what, detail in found:
        when = datetime.fromtimestamp(time_s, UTC)
        print(f"{when:%Y-%m-%d %H:%M:%S}  {by:16}  {what}  {printable(detail)}".rstrip())


def run_here(site: Site, name: str, command: Sequence[str]) -> int:
    """Runs a command in a VM, with the streams of this process."""
    from spvtpm.terminal.remote_command import run_in_vm

    streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}

    def write(stream: Literal["stdout", "stderr"], data: bytes) -> None:
        streams[stream].write(data)
        streams[stream].flush()

    owned = site.keyring.owned(name)
    return run_in_vm(site, owned, command, write, sys.stdin.fileno(), tell_waiting=lambda: tell_waiting(name))


def run_quietly(site: Site, name: str, command: Sequence[str]) -> tuple[int, bytes, bytes]:
    """Runs a command in a VM, without input: its exit code, and what it wrote to stdout and stderr."""
    from spvtpm.terminal.remote_command import run_in_vm

    written = {"stdout": bytearray(), "stderr": bytearray()}

    def write(stream: Literal["stdout", "stderr"], data: bytes) -> None:
        written[stream] += data
        if len(written[stream]) > _MAX_QUIET_BYTES:
            raise MessageError(f"the command has written more than {_MAX_QUIET_BYTES} bytes")

    code = run_in_vm(site, site.keyring.owned(name), command, write, tell_waiting=lambda: tell_waiting(name))
    return code, bytes(written["stdout"]), bytes(written["stderr"])


def tell_waiting(name: str) -> None:
    """To a person alone: what a script reads of stderr is the command's."""
    if sys.stderr.isatty():
        print(f"{name} is moving to another host; waiting for it", file=sys.stderr)


def _said(vm: Vm | None) -> str:
    if vm is None:
        return "nothing"
    words: str = vm.state
    if vm.host is not None:
        words += f" at {vm.host} (chip {vm.chip_id})"
    if vm.operation is not None:
        words += ", an operation is under way"
    if vm.failure:
        words += f"; {printable(vm.failure)}"
    return words


def _print_differences(line: Line) -> None:
    for difference in line.differences:
        print(f"  ! {difference}")


def _line_as_dict(line: Line) -> dict[str, object]:
    from spvtpm.terminal.whereabouts import describe

    return {
        "name": line.name,
        "vm_id": str(line.owned.vm_id) if line.owned else None,
        "vtpm_id": str(line.known.vtpm_id) if line.known else None,
        "place": describe(line.known.place) if line.known else None,
        "platform_says": msgspec.to_builtins(line.says),
        "differences": line.differences,
    }


def _policy(policy: Policy) -> str:
    """What the owner allows, in words."""
    words = ["it may move while it runs" if policy.migration_allowed else "it may not move while it runs"]
    if policy.chips is not None:
        words.append(f"chips {', '.join(sorted(chip.hex() for chip in policy.chips))} alone")
    if policy.minimum_firmware:
        words.append(f"firmware {policy.minimum_firmware} or newer")
    if policy.direct_path_only:
        words.append("direct path alone")
    if policy.pcr_banks:
        words.append(f"PCR banks {', '.join(sorted(policy.pcr_banks))}")
    return "; ".join(words)
