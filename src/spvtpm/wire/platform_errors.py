"""Errors of the cloud platform, its agents and VMs: what can go wrong between them and users, in the tree of `errors.py`."""

from __future__ import annotations

from spvtpm.wire.errors import PeerError, PolicyError, ResourceError, StorageError


class TooLarge(PeerError):
    """A request's body is longer than anything that is understood there."""

    code = "too-large"
    hint = "Send less: the API's description names the bounds."


class NoSuchToken(PolicyError):
    """The request has no token, or one that the platform does not know, or not any more."""

    code = "no-token"
    hint = "Ask the platform's administrator for a token, then `spvtpm login URL`."


class ScopeMissing(PolicyError):
    """The token does not allow this."""

    code = "scope"
    hint = "Use a token that has the scope named in the message."


class NoHost(PolicyError):
    """No host can take the VM."""

    code = "no-host"
    hint = "Ask for less, or free or add a host that has what was asked for; `spvtpm chips` lists what there is."


class OperationUnderWay(PolicyError):
    """Another operation on the VM has not ended yet."""

    code = "operation-under-way"
    hint = "Wait until it has ended; `spvtpm vm show NAME` tells."


class Cancelled(PolicyError):
    """A migration was cancelled by the user who had begun it."""

    code = "cancelled"
    hint = "The VM runs on where it was; `spvtpm vm migrate NAME` begins anew."


class IdempotencyMismatch(PolicyError):
    """An idempotency key was used before, for another request."""

    code = "idempotency-mismatch"
    hint = "Use a new key for a new request; the same one only to repeat a request whose answer was lost."


class Superseded(PolicyError):
    """An order to a host's agent is older than one that it has seen."""

    code = "superseded"
    hint = "Nothing is to be done: whoever gave the newer order carries on."


class Unavailable(ResourceError):
    """Something that the platform needs is away for now: its database, or a host."""

    code = "unavailable"
    hint = "Try again in a moment; it goes on by itself once that is back. If it stays away, check that it runs, and its address."


class NotMigrated(StorageError):
    """The platform's database has tables of another release."""

    code = "not-migrated"
    hint = "`spvtpm cloud migrate DIR` brings it to this release. A newer database needs the newer release."


class PartFailed(ResourceError):
    """A part of the stack that `spvtpm up` runs does not start, or ends again and again."""

    code = "part-failed"
    hint = "Read the end of the log that the message names; once that is mended, `spvtpm up` goes on where it was."


class PlatformUntrusted(PolicyError):
    """Nobody who is trusted vouches for the platform's certificate, or it is that of another name."""

    code = "platform-untrusted"
    hint = "Give --ca-file with the authority of a private platform to `spvtpm login`; if there is none, somebody is in between."


class NotLoggedIn(PolicyError):
    """The keyring knows no platform."""

    code = "not-logged-in"
    hint = "`spvtpm login URL` says which platform to use, and asks for the token that its administrator gave."


class PlatformContradicts(PeerError):
    """The platform says something else than a verified secure processor, or than the owner's keyring."""

    code = "platform-contradicts"
    hint = "Believe the secure processor and your keyring: `spvtpm vm show NAME` compares. Nothing secret has left."


class MachineFailed(ResourceError):
    """The machine of a VM did not come up, died, or did not do as it was told."""

    code = "machine"
    hint = "Start the VM again. The host has what its machine said last, in the agent's directory: vms/VM/log."


class ImageDamaged(PeerError):
    """It is no memory image of this VM, or was altered."""

    code = "memory-image"
    hint = "The VM cannot go on where it was. Start it anew: `spvtpm vm shutdown NAME`, then `spvtpm vm start NAME`."


class MemoryStreamDamaged(ImageDamaged):
    """The memory of a VM that moves is not what its machine has sealed last, for this handoff."""

    code = "memory-stream"
    hint = "Nothing of it was restored. While the VM is where it was, move it again; if it has moved, start it anew."


class CommandNotBegun(PolicyError):
    """A command came to a VM that was being suspended, powered off, or moved away."""

    code = "not-begun"
    hint = "Nothing was run. Say it again: if the VM has moved to another host, it runs there."


class EvidenceRefused(PolicyError):
    """What a VM shows as its vTPM's evidence does not show what it has to."""

    code = "evidence"
    hint = (
        "Trust nothing that this VM says of its boot until that is explained. "
        "If it shows nothing at all, look whether it has tpm2-tools: `spvtpm vm exec NAME -- tpm2_send --version`."
    )
