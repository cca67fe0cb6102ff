"""Errors of the cloud platform and its agents: what can go wrong between them and their users, in the tree of `errors.py`."""

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
    hint = "Try again in a moment; it goes on by itself once that is back."


class NotMigrated(StorageError):
    """The platform's database has tables of another release."""

    code = "not-migrated"
    hint = "`spvtpm cloud migrate DIR` brings it to this release. A newer database needs the newer release."


class PartFailed(ResourceError):
    """A part of the stack that `spvtpm up` runs does not start, or ends again and again."""

    code = "part-failed"
    hint = "Read the end of the log that the message names; once that is mended, `spvtpm up` goes on where it was."
