"""One error tree for everything that crosses a domain border.

Errors are split by the party at fault. Each class has a stable `code` (it crosses the wire), a public sentence (the
message given when raised; it must never contain a secret) and a `hint` for the person who reads it.
"""

from __future__ import annotations

from typing import ClassVar


class SpvtpmError(Exception):
    """Base of all errors a caller can react to.

    Attributes:
        code: stable word that names the kind of error on the wire and in `--json` output.
        hint: what the reader can do about it; a constant sentence, never derived from input.
    """

    code: ClassVar[str] = "internal"
    hint: ClassVar[str] = "This is a defect in spvtpm: please report it with the log."


class PeerError(SpvtpmError):
    """The other side sent something it must not send."""

    code = "bad-request"
    hint = "Check that both sides run the same version of spvtpm."


class FrameError(PeerError):
    """A length-prefixed frame is malformed, too long or cut off."""

    code = "bad-frame"


class MessageError(PeerError):
    """A frame's content is no message that this side understands."""

    code = "bad-message"


class MailboxError(PeerError):
    """An encrypted frame in VM memory is malformed, forged, replayed or out of bounds."""

    code = "bad-mailbox-frame"
    hint = "The memory between VM and vTPM was altered, or the VM uses another VM key than the secure processor."


class InstanceFileError(PeerError):
    """It is no instance file, or holds what no instance file may hold."""

    code = "bad-instance-file"
    hint = "Give the file as it was exported; an authentic file that is malformed is a defect of what exported it."


class InstanceFormatUnknown(InstanceFileError):
    """An instance file of a format version that this side does not know."""

    code = "instance-format"
    hint = "Use a release of spvtpm that knows this version; no version is ever converted or guessed."


class InstanceDamaged(InstanceFileError):
    """The keys are right, and the instance file is not what was exported under them."""

    code = "instance-damaged"
    hint = "The file was altered after its export. Take another copy of it; nothing was restored."


class InstanceTruncated(InstanceFileError):
    """The instance file ends before its last byte."""

    code = "instance-truncated"
    hint = "Fetch or copy the file again, whole; nothing was restored."


class InstanceOverlong(InstanceFileError):
    """Bytes follow the last one that belongs to the instance file."""

    code = "instance-overlong"
    hint = "Give the file alone, with nothing behind it; nothing was restored."


class InterfaceError(PeerError):
    """The vTPM interface did not behave as the specification says, or is gone."""

    code = "interface"
    hint = "Start the client again; if that does not help, restart the VM. The VM's host sees more in `spvtpm hypervisor list`."


class ChannelError(PeerError):
    """The confidential channel broke: what came is not what the other side sent, or the other side is another."""

    code = "channel"
    hint = "Say it again, if the VM runs: `spvtpm vm show NAME` tells. If it stays so, something alters what is sent."


class CertificateError(PeerError):
    """A certificate, a chain or a revocation list is malformed, or not exactly as its profile says."""

    code = "bad-certificate"
    hint = "Ask for the chain again; if it stays like that, the other side is no secure processor of this kind."


class PolicyError(SpvtpmError):
    """The request is well formed but not allowed."""

    code = "refused"
    hint = "The VM's security block does not allow this operation in its present state."


class PermissionRefused(PolicyError):
    """The calling process may not use this socket."""

    code = "permission"
    hint = "Run the command as a user listed in `allowed_uids` of the secure processor's configuration."


class NotFound(PolicyError):
    """No such VM or vTPM."""

    code = "not-found"
    hint = "List what exists: `spvtpm vm ls` or `spvtpm terminal list`; for a host's administrator, `spvtpm hypervisor list`."


class ChipUnknown(PolicyError):
    """The vendor has made no chip of this id."""

    code = "unknown-chip"
    hint = "The directory `chips` of the vendor has the certificate of each chip, named after its id."


class AlreadyExists(PolicyError):
    """The VM, vTPM or file exists already."""

    code = "exists"
    hint = "Nothing was replaced. Use what is there, or give another name."


class AlreadyInitialised(AlreadyExists):
    """The directory holds a secure processor already."""

    code = "initialised"
    hint = "Run what is there, or give another directory. Removing a secure processor destroys every vTPM in it."


class MigrationForbidden(PolicyError):
    """The owner does not allow the vTPM to move."""

    code = "migration-forbidden"
    hint = "Only its owner can move it, with an export and an import: `spvtpm vm shutdown`, `spvtpm vm start --host`."


class DirectPathOnly(PolicyError):
    """The VM's owner wants its vTPM reached through encrypted memory alone."""

    code = "direct-path-only"
    hint = "Begin the boot without the TPM emulator interface, or have the owner make the VM with `--emulator`."


class WrongToken(PolicyError):
    """A token is not the one that this handoff waits for."""

    code = "wrong-token"
    hint = "Ask the other side of the same handoff for it again; nothing was changed."


class WrongInstanceKeys(PolicyError):
    """The instance file was sealed under another `UserSecret` or `SpSecret` than those at hand."""

    code = "instance-keys"
    hint = (
        "Use the secret of the user who exported the file, and a secure processor of the fleet that its header names."
    )


class StaleInstance(PolicyError):
    """An instance file is older than what is known of its vTPM, or its vTPM lives already."""

    code = "stale-instance"
    hint = "Use the newest export of this vTPM. An older one is never taken back: what happened since would be undone."


class ExportSuperseded(PolicyError):
    """The export that is acknowledged is not the last one, or its vTPM has been used since."""

    code = "export-superseded"
    hint = "Export again; the file that was acknowledged is not the vTPM's newest state, and nothing was destroyed."


class WrongState(PolicyError):
    """The VM's or vTPM's state does not allow this command now."""

    code = "wrong-state"
    hint = "Look at the state: `spvtpm vm show NAME`, or at the host `spvtpm hypervisor list`."


class PcrBankUnknown(PolicyError):
    """A vTPM cannot have a PCR bank of this name."""

    code = "pcr-bank"
    hint = "Name banks that the sentence lists, or none at all: then the vTPM has those that it is manufactured with."


class ResourceError(SpvtpmError):
    """Something this side needs is exhausted or broken; nothing acknowledged was lost."""

    code = "resource"
    hint = "Free the resource named in the message and try again."


class NoSecureProcessor(PolicyError):
    """The directory is not that of a secure processor, or cannot become one."""

    code = "no-sp"
    hint = "`spvtpm sp init DIR` makes a secure processor in an empty or missing directory with a short path."


class CertificateRefused(PolicyError):
    """A certificate is well formed, but does not show what it has to show here."""

    code = "certificate-refused"
    hint = "Send this secure processor no secret: it is not what it was taken for."


class UntrustedIssuer(CertificateRefused):
    """The chain of signatures does not lead to a trusted vendor."""

    code = "untrusted-issuer"
    hint = "Compare the vendor's root certificate with the vendor's own publication, then trust it or leave."


class CertificateExpired(CertificateRefused):
    """A certificate is not valid yet, or not any more."""

    code = "certificate-expired"
    hint = (
        "Check this machine's clock. A secure processor renews its channel certificate; the vendor renews the others."
    )


class CertificateRevoked(CertificateRefused):
    """The vendor has revoked the chip."""

    code = "certificate-revoked"
    hint = "Send this chip no secret; ask the vendor why it was revoked."


class RevocationUnknown(CertificateRefused):
    """The revocation list does not tell whether the chip is revoked: too old, or not of the chip's vendor."""

    code = "revocation-unknown"
    hint = "Get the vendor's newest revocation list; a platform that withholds it may have a reason."


class ChipNotAllowed(CertificateRefused):
    """A genuine chip, but not one that was asked for: another chip or fleet, or a feature missing."""

    code = "chip-not-allowed"
    hint = "Use a host whose chip meets the policy, or change the policy."


class FirmwareTooOld(CertificateRefused):
    """The chip runs firmware older than the policy allows."""

    code = "firmware-too-old"
    hint = "Have the host's firmware updated, or use another host."


class GenerationError(PolicyError):
    """A generation of the `SpSecret` that cannot be derived here."""

    code = "generation"
    hint = "A chip opens files of its own generation and of older ones. Update it, or use one that is newer."


class WrongPassphrase(PolicyError):
    """The keyring does not open with this passphrase."""

    code = "passphrase"
    hint = "Give the passphrase that the keyring was made with; without it, nothing in the keyring can be had."


class NotAdmitted(PolicyError):
    """The secure processor takes only VMs that its hypervisor has announced."""

    code = "not-admitted"
    hint = "Ask the platform for a place first; `spvtpm vm create` does."


class TooMany(PolicyError):
    """More of something than one user may have at a time."""

    code = "too-many"
    hint = "Wait until some of them have ended, or end some."


class UsageError(PolicyError):
    """The command line asks for something that makes no sense."""

    code = "usage"
    hint = "See --help of the command."


class NotRunning(ResourceError):
    """No secure processor listens on the socket."""

    code = "not-running"
    hint = "Start it with `spvtpm sp run DIR`; its socket is DIR/run/sp.sock. It takes commands once it says so."


class StorageError(ResourceError):
    """Non-volatile storage cannot be read or written."""

    code = "storage"
    hint = "Check the path, its permissions (secrets: 0600) and free space. A write that failed was not acknowledged."


class IntegrityError(StorageError):
    """A stored record is missing, altered, swapped or not of this secure processor."""

    code = "integrity"
    hint = "The state directory was changed from outside. Restore it from where it was altered; nothing was reset."


class FusesError(StorageError):
    """What stands for the chip's fuses is missing, damaged or readable by others, or the hardware does not open them."""

    code = "fuses"
    hint = (
        "Bring the fuses back as they were: private files of the user that runs this, and the TPM or token behind them."
    )


class ConfigError(StorageError):
    """The configuration cannot be read, or says something that makes no sense."""

    code = "config"
    hint = "Correct the file. `init` of `spvtpm sp`, `spvtpm agent` and `spvtpm cloud` writes one that names all keys."


class ChipFileError(StorageError):
    """The file that holds a manufactured chip's secrets is missing, damaged or readable by others."""

    code = "chip-file"
    hint = "Restore the chip file with mode 0600. It is made once, by the vendor, and never again."


class VendorError(StorageError):
    """The vendor's directory is missing, damaged or readable by others."""

    code = "vendor"
    hint = "Restore the vendor's directory from its backup; its private files need mode 0600."


class KeyringError(StorageError):
    """The owner's keyring is missing, damaged or open to others, or its file of an export is."""

    code = "keyring"
    hint = (
        "`spvtpm terminal init` makes a keyring; `spvtpm up` tells how to use the one that it has made. "
        "Restore a damaged one from its backup: directory 0700, files 0600."
    )


class VmKeyError(StorageError):
    """A VM's key is missing, readable by others, or none."""

    code = "vm-key"
    hint = (
        "It has 32 bytes, mode 0600 (`chmod 600 FILE`), and is the same for the VM and its secure processor; "
        "`spvtpm guest new-key FILE` makes one where there is none."
    )


class StateInUse(ResourceError):
    """Another secure processor runs on the same state directory."""

    code = "in-use"
    hint = "Stop the other process first, or use another directory."


class WorkerError(ResourceError):
    """The process that runs a vTPM died, hung, or broke the protocol."""

    code = "worker"
    hint = "A reset starts it again from its last durable state: `spvtpm hypervisor reset`; in Python, `VTPM.reset()`."


def _tree(base: type[SpvtpmError]) -> list[type[SpvtpmError]]:
    return [base, *(found for child in base.__subclasses__() for found in _tree(child))]


def error_from_code(code: str, message: str) -> SpvtpmError:
    """The error that a code received from the other side stands for; an unknown code gives a plain `SpvtpmError`."""
    for candidate in _tree(SpvtpmError):
        if candidate.code == code:
            return candidate(message)
    return SpvtpmError(f"{code}: {message}")
