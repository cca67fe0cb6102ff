"""`spvtpm vm`: your VMs at a cloud platform. Every secret goes through the confidential channel to a verified chip."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from spvtpm.cli.attestations import Questions, print_attested, refuse
from spvtpm.cli.parts import INTERRUPTED, Json, print_json
from spvtpm.cli.platform_parts import at_platform
from spvtpm.cli.terminal_parts import Own, print_vms
from spvtpm.cli.vm_parts import (
    NewVm,
    Wishes,
    print_comparison,
    print_events,
    print_exported,
    print_lines,
    print_moved,
)
from spvtpm.wire.errors import UsageError

vm_app = App(
    name="vm", help="Your VMs at a cloud platform, which is trusted with nothing. Begin with `spvtpm login URL`."
)

Name = Annotated[str, Parameter(help="The VM's name in your keyring.")]
_NO_KEYRING, _ANY, _NEW, _USUAL = Own(), Wishes(), NewVm(), Questions()
Stay = Annotated[
    bool, Parameter(negative="", help="Leave the vTPM at the secure processor, rather than bring it home in a file.")
]


@vm_app.command
def create(
    name: Name, /, *, wishes: Wishes = _ANY, new: NewVm = _NEW, own: Own = _NO_KEYRING, json: Json = False
) -> None:
    """Make a VM with a new vTPM, and start it.

    Example: spvtpm vm create web --minimum-firmware 1

    What you wish is asked of the platform, checked here against the chip that it picks, and enforced by the chip afterwards.
    """
    owned = wishes.owned(name, new)
    with at_platform(own, json) as site:
        from spvtpm.terminal.creation import create

        made = create(site, owned)
    print_vms([made], json)


@vm_app.command(name=["ls", "list"])
def list_vms(*, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """List your VMs: what the platform says, and where that is not what your keyring knows.

    Example: spvtpm vm ls
    """
    with at_platform(own, json) as site:
        from spvtpm.terminal.overview import list_all

        lines = list_all(site)
    print_lines(lines, json)


@vm_app.command
def show(name: Name, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Show a VM: what the platform says, what your keyring knows, and what its secure processor says, asked just now.

    Example: spvtpm vm show web
    """
    with at_platform(own, json) as site:
        from spvtpm.terminal.overview import compare

        found = compare(site, name)
    print_comparison(found, json)


@vm_app.command
def start(name: Name, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Boot a VM that was shut down; if its vTPM is at home, it is placed and brought there first.

    Example: spvtpm vm start web
    """
    _begin(name, "start", own, json)


@vm_app.command
def resume(name: Name, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Go on with a VM where it was hibernated; if its vTPM is at home, it is placed and brought there first.

    Example: spvtpm vm resume web
    """
    _begin(name, "resume", own, json)


@vm_app.command
def shutdown(name: Name, /, *, stay: Stay = False, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Shut a VM down, and bring its vTPM home in a file; nothing of it stays at the host.

    Example: spvtpm vm shutdown web
    """
    _end(name, "shutdown", stay, own, json)


@vm_app.command
def hibernate(name: Name, /, *, stay: Stay = False, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Suspend a VM, and bring its vTPM home in a file. The platform keeps the VM's memory, which it cannot read.

    Example: spvtpm vm hibernate web
    """
    _end(name, "hibernate", stay, own, json)


@vm_app.command
def migrate(
    name: Name,
    /,
    *,
    to: Annotated[str | None, Parameter(help="The platform's host where it shall be.")] = None,
    auto: Annotated[bool, Parameter(negative="", help="Any host that will do; the platform chooses.")] = False,
    own: Own = _NO_KEYRING,
    json: Json = False,
) -> None:
    """Move a VM to another host while it runs; its vTPM goes from chip to chip, its memory along with it, and nobody reads them.

    Example: spvtpm vm migrate web --auto

    Ctrl-C cancels it, if it is not too late, and tells which it was. Afterwards the chip where the VM runs has confirmed it, and
    the one where it was, if it answers, that it has given the vTPM away.
    """
    if (to is None) != auto:
        raise UsageError("say where: --to HOST, or --auto")
    with at_platform(own, json) as site:
        from spvtpm.terminal.migration import migrate

        moved = migrate(site, name, to)
    print_moved(name, moved, json)
    if moved.was_cancelled:
        sys.exit(INTERRUPTED)


@vm_app.command
def recover(name: Name, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Bring home the vTPM of a VM that does not run any more, as after a power loss, without another boot.

    Example: spvtpm vm recover web
    """
    with at_platform(own, json) as site:
        from spvtpm.terminal.departure import recover

        exported = recover(site, name)
    print_exported(name, exported, json)


@vm_app.command
def export(name: Name, file: Path, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Bring the vTPM of a VM that does not run into a file of your choice; from the secure processor, or from your keyring.

    Example: spvtpm vm export web web.vtpm

    Parameters
    ----------
    file
        The instance file; it must not exist.
    """
    with at_platform(own, json) as site:
        from spvtpm.terminal.departure import recover

        exported = recover(site, name, file.absolute())
    print_exported(name, exported, json)


@vm_app.command(name="import")
def import_(name: Name, file: Path, /, *, wishes: Wishes = _ANY, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Place a VM, and bring its vTPM there out of a file. `vm start` or `vm resume` has it run then.

    Example: spvtpm vm import web web.vtpm

    A name that your keyring does not have becomes a new VM; only then wishes count. The vTPM keeps its policy and its label.

    Parameters
    ----------
    file
        The instance file.
    """
    owned = wishes.owned(name, _NEW)
    with at_platform(own, json) as site:
        from spvtpm.terminal.comeback import bring

        made = bring(site, owned, file.absolute())
    print_vms([made], json)


@vm_app.command
def destroy(
    name: Name,
    /,
    *,
    yes: Annotated[bool, Parameter(negative="")] = False,
    chip_lost: Annotated[bool, Parameter(negative="")] = False,
    own: Own = _NO_KEYRING,
    json: Json = False,
) -> None:
    """Destroy a VM, its vTPM and its keys, for good, wherever they are.

    Example: spvtpm vm destroy web --yes

    Parameters
    ----------
    yes
        Needed, because it cannot be undone.
    chip_lost
        Its chip is lost for ever: forget the VM without asking there.
    """
    if not yes:
        raise UsageError("this destroys keys and NV for good; say --yes if that is meant")
    with at_platform(own, json) as site:
        from spvtpm.terminal.destruction import destroy

        destroy(site, name, chip_lost=chip_lost)
    if json:
        print_json({"name": name, "destroyed": True})
    else:
        print(f"{name} destroyed")


@vm_app.command(name="exec")
def exec_(
    name: Name,
    /,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    own: Own = _NO_KEYRING,
    json: Json = False,
) -> None:
    """Run a command in a VM; nobody but you and the VM sees what it reads and writes. Ctrl-C ends it.

    Example: spvtpm vm exec web -- tpm2_pcrread sha256:0

    Ends with the command's exit code. With --json, which reads no input, tells it together with what was written.

    Parameters
    ----------
    command
        The program, and what it is told; behind `--`.
    """
    from spvtpm.cli.vm_parts import run_here, run_quietly

    with at_platform(own, json) as site:
        if not json:
            sys.exit(run_here(site, name, command))
        code, output, errors = run_quietly(site, name, command)
    print_json({"code": code, "stdout": output.decode(errors="replace"), "stderr": errors.decode(errors="replace")})
    sys.exit(code)


@vm_app.command
def publish_pcrs(name: Name, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Read the PCRs of a VM's vTPM in the VM, and show them to everybody who may see the VM at the platform.

    Example: spvtpm vm publish-pcrs web
    """
    from spvtpm.cli.vm_parts import run_quietly

    with at_platform(own, json) as site:
        from spvtpm.terminal.pcrs import read_pcrs

        pcrs = read_pcrs(lambda command: run_quietly(site, name, command)[:2])
        site.platform.publish(site.keyring.owned(name).vm_id, pcrs)
    if json:
        print_json(pcrs)
    else:
        print(f"published: {', '.join(f'{len(values)} PCRs of {bank}' for bank, values in sorted(pcrs.banks.items()))}")


@vm_app.command
def attest(name: Name, /, *, questions: Questions = _USUAL, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Have a running VM's vTPM attest the VM's boot: its PCRs, signed for this moment by a key that no other TPM has.

    Example: spvtpm vm attest web --pcrs sha256:0,1,2,7 --policy expected.json

    Exit code 0: it is this VM's vTPM, and the PCRs are as the policy has it, if there is one. 3: it is not, or they are not.
    The VM needs tpm2-tools.
    """
    expected = questions.expected()
    with at_platform(own, json) as site:
        attested = questions.ask(site, name, expected)
    print_attested(attested, json)
    refuse(attested)


@vm_app.command
def events(name: Name, /, *, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """What happened to a VM: as the platform saw it, and, while its vTPM is at a chip, as its secure processor saw it.

    Example: spvtpm vm events web
    """
    with at_platform(own, json) as site:
        print_events(site, name, json)


def _begin(name: str, how: Literal["start", "resume"], own: Own, json: bool) -> None:
    with at_platform(own, json) as site:
        from spvtpm.terminal.comeback import begin

        made = begin(site, name, how)
    print_vms([made], json)


def _end(name: str, how: Literal["shutdown", "hibernate"], stay: bool, own: Own, json: bool) -> None:
    with at_platform(own, json) as site:
        from spvtpm.terminal.departure import end
        from spvtpm.terminal.exports import Exported

        ended = end(site, name, how, stay=stay)
    if isinstance(ended, Exported):
        print_exported(name, ended, json)
    else:
        print_vms([ended], json)
