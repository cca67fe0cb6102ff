"""`spvtpm terminal`: the owner's side. It verifies a secure processor, gives it secrets, and keeps what comes out of it."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from spvtpm.cli.parts import Json, print_json
from spvtpm.cli.terminal_parts import (
    Own,
    Towards,
    Vm,
    Vtpm,
    as_dict,
    ask_passphrase,
    print_vms,
    progress_bar,
)
from spvtpm.wire.errors import NotFound, StorageError, UsageError
from spvtpm.wire.instance_content import Policy

terminal_app = App(name="terminal", help="The owner's side: verify a secure processor, own vTPMs, keep their files.")

_MAX_PEM_BYTES = 4096
_NO_KEYRING = Own()


@terminal_app.command
def init(*, own: Own = _NO_KEYRING, passphrase: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Make a keyring: a new owner key and a first secret.

    Example: spvtpm terminal init --passphrase

    Parameters
    ----------
    passphrase
        Protect it with a passphrase, which is asked for unless --passphrase-file gives it.
    """
    from spvtpm.terminal.keyring import Keyring, read_passphrase
    from spvtpm.wire.owner_certificates import fingerprint, parse_owner_certificate

    secret = None
    if own.passphrase_file is not None:
        secret = read_passphrase(own.passphrase_file)
    elif passphrase:
        secret = ask_passphrase("New passphrase: ")
        if ask_passphrase("The same again: ") != secret:
            raise UsageError("these were two different passphrases")
    keyring = Keyring.create(own.directory(), secret)
    owner = fingerprint(parse_owner_certificate(keyring.content.certificate))
    print(
        f"keyring of owner {owner.hex()} made in {keyring.directory}; back it up: without it, no vTPM can be had back"
    )


@terminal_app.command
def trust(root: Path | None = None, /, *, revoked: Path | None = None, own: Own = _NO_KEYRING) -> None:
    """Trust a vendor, or take his newest revocation list, or both.

    Example: spvtpm terminal trust root.pem --revoked revoked.pem

    Parameters
    ----------
    root
        The vendor's root certificate, PEM. Compare it with the vendor's own publication first.
    revoked
        The vendor's newest revocation list, PEM.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from spvtpm.files import read_file
    from spvtpm.wire.revocation import MAX_REVOCATION_LIST_BYTES

    if root is None and revoked is None:
        raise UsageError("give a vendor's ROOT.pem, or --revoked LIST.pem, or both")
    keyring = own.open()
    try:
        if root is not None:
            certificate = x509.load_pem_x509_certificate(read_file(root, _MAX_PEM_BYTES, private=False))
            keyring.trust_root(certificate.public_bytes(Encoding.DER))
            print(f"trusted: {certificate.subject.rfc4514_string()}")
        if revoked is not None:
            pem = read_file(revoked, 2 * MAX_REVOCATION_LIST_BYTES, private=False)
            listed = keyring.put_revocation_list(x509.load_pem_x509_crl(pem).public_bytes(Encoding.DER))
            print(f"revocation list {listed.number}, current until {listed.next_update:%Y-%m-%d}")
    except ValueError:
        raise UsageError("no PEM of a certificate, or of a revocation list") from None


@terminal_app.command
def verify(*, towards: Towards, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Verify a secure processor, and open a channel to it; nothing is sent but the owner's certificate.

    Example: spvtpm terminal verify --channel run/channel.sock --minimum-firmware 1
    """
    with towards.desk(own, json).connect() as session:
        if json:
            print_json(as_dict(session.verified))
        else:
            print("a channel to it can be opened")


@terminal_app.command
def provision(
    vm: Vm,
    /,
    *,
    vm_key: Path,
    towards: Towards,
    import_: Annotated[Path | None, Parameter(name="--import")] = None,
    label: str = "",
    no_migration: Annotated[bool, Parameter(negative="")] = False,
    emulator: Annotated[bool, Parameter(negative="")] = False,
    pcr_bank: Annotated[list[str] | None, Parameter(negative="")] = None,
    own: Own = _NO_KEYRING,
    json: Json = False,
) -> None:
    """Make a VM at a secure processor: its security block, its secrets, and how its vTPM begins.

    Example: spvtpm terminal provision 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --channel run/channel.sock --vm-key VM.key

    --chip and --minimum-firmware are verified now, and become part of the vTPM's policy. An imported vTPM keeps its own.

    Parameters
    ----------
    vm_key
        The VM's key, from `spvtpm guest new-key`; the VM has the same.
    import_
        An instance file that the vTPM comes out of, rather than beginning anew.
    label
        Your words for the vTPM, up to 256 characters.
    no_migration
        Policy: it is never handed to another secure processor while it runs.
    emulator
        Policy: QEMU may attach it as a TPM emulator; the host sees all commands then. Otherwise it is reached through encrypted
        memory alone.
    pcr_bank
        Policy: a PCR bank that it has, such as sha256; may be repeated.
    """
    from spvtpm.guest.vm_key import read_vm_key

    key, desk = read_vm_key(vm_key), towards.desk(own, json)
    if import_ is not None:
        if label or no_migration or emulator or pcr_bank:
            raise UsageError("a vTPM out of a file keeps its policy and its label: leave them out with --import")
        from spvtpm.terminal.imports import import_vtpm

        with progress_bar("import") as progress:
            made = import_vtpm(desk, vm, key, import_, progress)
    else:
        made = desk.provision(vm, key, _policy(towards, not no_migration, emulator, pcr_bank or []), label)
    print_vms([made], json)


def _policy(towards: Towards, migration: bool, emulator: bool, pcr_banks: list[str]) -> Policy:
    try:
        return msgspec.convert(
            {
                "migration_allowed": migration,
                "chips": towards.chips(),
                "minimum_firmware": towards.minimum_firmware,
                "direct_path_only": not emulator,
                "pcr_banks": frozenset(pcr_banks),
            },
            Policy,
        )
    except msgspec.ValidationError as error:
        raise UsageError(f"no such policy: {error}") from None


@terminal_app.command
def export(vm: Vm, output: Path, /, *, towards: Towards, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Bring the vTPM of a stopped or hibernated VM into a file; the secure processor keeps nothing of it.

    Example: spvtpm terminal export 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 vm.instance --channel run/channel.sock

    If it is broken off, say the same again: it finishes what was begun, or repeats it.

    Parameters
    ----------
    output
        The instance file; it must not exist.
    """
    from spvtpm.terminal.exports import export_vtpm

    with progress_bar("export") as progress:
        done = export_vtpm(towards.desk(own, json), vm, output, progress)
    if json:
        told = {"vtpm_id": str(done.known.vtpm_id), "version": done.file.version, "path": done.file.path}
        print_json({**told, "sha256": done.file.sha256.hex(), "resumed": done.resumed})
    else:
        before = " already" if done.resumed else ""
        print(f"vTPM {done.known.vtpm_id} exported{before} as version {done.file.version}: {done.file.path}")


@terminal_app.command
def destroy(
    vm: Vm, /, *, towards: Towards, yes: Annotated[bool, Parameter(negative="")] = False, own: Own = _NO_KEYRING
) -> None:
    """Destroy a VM's security block, vTPM and secrets, for good, without an export.

    Example: spvtpm terminal destroy 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --channel run/channel.sock --yes

    Parameters
    ----------
    yes
        Needed, because it cannot be undone.
    """
    if not yes:
        raise UsageError("this destroys keys and NV for good; say --yes if that is meant")
    towards.desk(own).destroy(vm)
    print(f"VM {vm} destroyed")


@terminal_app.command
def rotate_secret(
    *, towards: Towards, same: Annotated[bool, Parameter(negative="")] = False, own: Own = _NO_KEYRING
) -> None:
    """Make a new secret, and give it to all your VMs at a secure processor. Older files still open: older secrets are kept.

    Example: spvtpm terminal rotate-secret --channel run/channel.sock

    Parameters
    ----------
    same
        Give out the newest secret that is there: for the next secure processor, or after a rotation that was broken off.
    """
    print(f"VMs that have the new secret: {towards.desk(own).rotate(same=same)}")


@terminal_app.command(name="list")
def list_vms(*, towards: Towards, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """List your VMs at a secure processor.

    Example: spvtpm terminal list --channel run/channel.sock --json
    """
    print_vms(towards.desk(own, json).list_mine(), json)


@terminal_app.command
def status(*, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """What the keyring remembers: each vTPM, its newest version, and where it lives. Asks nobody.

    Example: spvtpm terminal status
    """
    from spvtpm.terminal.whereabouts import describe

    known = own.open().content.vtpms
    if json:
        print_json(
            [
                {
                    "vtpm_id": str(one.vtpm_id),
                    "vm_id": str(one.vm_id),
                    "label": one.label,
                    "newest": one.newest,
                    "place": describe(one.place),
                }
                for one in known
            ]
        )
        return
    for one in known:
        print(f"{one.vtpm_id}  version {one.newest}, VM {one.vm_id}{f'  {one.label}' if one.label else ''}")
        print(f"  {describe(one.place)}")


@terminal_app.command
def fate(vtpm: Vtpm, /, *, towards: Towards, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """Ask a secure processor what became of a vTPM, and remember it; after a transfer that was broken off, for one.

    Example: spvtpm terminal fate 0b7c6f4e-6a52-4a0c-9d0e-0a4f1a3c5d7e --channel run/channel.sock
    """
    told = towards.desk(own, json).fate(vtpm)
    if json:
        print_json(
            {
                "vtpm_id": str(vtpm),
                "state": told.state,
                "version": told.version,
                "sha256": None if told.sha256 is None else told.sha256.hex(),
                "chip_id": None if told.chip is None else told.chip.hex(),
            }
        )
    else:
        to = f" to the chip {told.chip.hex()}" if told.chip is not None else ""
        print(f"vTPM {vtpm}: {told.state}{to}" + (f", version {told.version}" if told.version else ""))


@terminal_app.command
def events(vm: Vm, /, *, towards: Towards, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """What happened to a VM, as its secure processor saw it. Times are by a clock that the host sets.

    Example: spvtpm terminal events 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --channel run/channel.sock
    """
    found = towards.desk(own, json).events(vm)
    if json:
        print_json(found)
        return
    for event in found:
        print(f"{datetime.fromtimestamp(event.time_s, UTC):%Y-%m-%d %H:%M:%S}  {event.what}  {event.detail}".rstrip())


@terminal_app.command
def endorsement(
    vm: Vm, /, *, towards: Towards, output: Path | None = None, own: Own = _NO_KEYRING, json: Json = False
) -> None:
    """The certificates of a VM's vTPM's endorsement keys, and the chain of the chip that signed them; verified.

    Example: spvtpm terminal endorsement 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --channel run/channel.sock --output ek

    Parameters
    ----------
    output
        A directory for ek-N.pem and issuer.pem; otherwise all are printed.
    """
    from spvtpm.files import PUBLIC, create_file
    from spvtpm.terminal.attestation import to_pem

    found, chip = towards.desk(own, json).endorsement(vm)
    issuer = "".join(to_pem(der) for der in found.issuer)
    certificates = [to_pem(der) for der in found.certificates]
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {output}: {error.strerror}") from None
        for number, pem in enumerate(certificates, 1):
            create_file(output / f"ek-{number}.pem", pem.encode(), PUBLIC)
        create_file(output / "issuer.pem", issuer.encode(), PUBLIC)
    if json:
        told = {"vtpm_id": str(found.vtpm_id), "certificates": certificates, "issuer": issuer, "chip": as_dict(chip)}
        print_json(told)
    elif output is None:
        print("".join([*certificates, issuer]), end="")
    else:
        print(f"{len(certificates)} certificates of vTPM {found.vtpm_id}, signed by {chip}, in {output}")


@terminal_app.command
def forget(vtpm: Vtpm, /, *, own: Own = _NO_KEYRING) -> None:
    """Forget a vTPM, after its chip is lost for ever, for one. **An older or second copy of it is not refused any more.**

    Example: spvtpm terminal forget 0b7c6f4e-6a52-4a0c-9d0e-0a4f1a3c5d7e
    """
    keyring = own.open()
    with keyring.moving():
        if not keyring.forget(vtpm):
            raise NotFound(f"the keyring knows no vTPM {vtpm}")
    print(f"vTPM {vtpm} forgotten; an older file of it would not be noticed", file=sys.stderr)


@terminal_app.command
def inspect(file: Path, /, *, json: Json = False) -> None:
    """What an instance file says of itself in clear. Nobody has checked it: whoever gave it may have made it up.

    Example: spvtpm terminal inspect vm.instance

    Parameters
    ----------
    file
        The instance file.
    """
    from spvtpm.files import read_file
    from spvtpm.wire.instance_header import MAX_FILE_BYTES, parse_instance_header

    header = parse_instance_header(read_file(file, MAX_FILE_BYTES, private=False))
    created = datetime.fromtimestamp(header.created_s, UTC)
    told = {
        "vtpm_id": str(header.vtpm_id),
        "vm_id": str(header.vm_id),
        "version": header.version,
        "hibernated": header.hibernated,
        "fleet_id": header.fleet_id.hex(),
        "generation": header.generation,
        "created": f"{created:%Y-%m-%dT%H:%M:%SZ}",
    }
    if json:
        print_json(told)
        return
    for name, value in told.items():
        print(f"{name:12}{value}")
