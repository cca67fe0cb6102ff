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


class InterfaceError(PeerError):
    """The vTPM interface did not behave as the specification says, or is gone."""

    code = "interface"
    hint = "Start the client again; if that does not help, restart the VM. The VM's host sees more in `spvtpm hypervisor list`."


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
    hint = "List what exists with `spvtpm hypervisor list`."


class AlreadyExists(PolicyError):
    """The VM, vTPM or file exists already."""

    code = "exists"
    hint = "A VM has one security block, a security block one vTPM; a key or a socket in use is never replaced."


class AlreadyInitialised(AlreadyExists):
    """The directory holds a secure processor already."""

    code = "initialised"
    hint = "Run the one that is there, or give another directory. Removing it destroys every vTPM in it."


class WrongState(PolicyError):
    """The VM's or vTPM's state does not allow this command now."""

    code = "wrong-state"
    hint = "Look at the state with `spvtpm hypervisor list`."


class ResourceError(SpvtpmError):
    """Something this side needs is exhausted or broken; nothing acknowledged was lost."""

    code = "resource"
    hint = "Free the resource named in the message and try again."


class NoSecureProcessor(PolicyError):
    """The directory is not that of a secure processor, or cannot become one."""

    code = "no-sp"
    hint = "`spvtpm sp init DIR` makes a secure processor in an empty or missing directory with a short path."


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
    hint = "Check free space and permissions of the state directory; the write was not acknowledged."


class IntegrityError(StorageError):
    """A stored record is missing, altered, swapped or not of this secure processor."""

    code = "integrity"
    hint = "The state directory was changed from outside. Restore it from where it was altered; nothing was reset."


class FusesError(StorageError):
    """The file that stands for the chip's fuses is missing, damaged or readable by others."""

    code = "fuses"
    hint = "Restore the fuses file with mode 0600, owned by the user that runs the secure processor."


class ConfigError(StorageError):
    """The configuration cannot be read, or says something that makes no sense."""

    code = "config"
    hint = "Correct the file. Every key may be left out; `spvtpm sp init` writes a file that names them all."


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
    hint = "Stop the other process first, or use a directory of its own."


class WorkerError(ResourceError):
    """The process that runs a vTPM died, hung, or broke the protocol."""

    code = "worker"
    hint = (
        "A reset starts it again from its last durable state: `spvtpm hypervisor reset`, or `VTPM.reset()` in Python."
    )


def _tree(base: type[SpvtpmError]) -> list[type[SpvtpmError]]:
    return [base, *(found for child in base.__subclasses__() for found in _tree(child))]


def error_from_code(code: str, message: str) -> SpvtpmError:
    """The error that a code received from the other side stands for; an unknown code gives a plain `SpvtpmError`."""
    for candidate in _tree(SpvtpmError):
        if candidate.code == code:
            return candidate(message)
    return SpvtpmError(f"{code}: {message}")
