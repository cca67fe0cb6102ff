"""One confidential channel from the owner's side: introductions, verification, then typed requests. Blocking.

Until the other side's chain is verified, the only byte that leaves is a knock. Then the owner's certificate, which is public;
and secrets when TLS has shown that the other side has the verified certificate's key.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from spvtpm.terminal.attestation import Verified
from spvtpm.terminal.conversation import Conversation, hear_clear
from spvtpm.terminal.relay import OpenRelay
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import InstanceFileError, MessageError, SpvtpmError, error_from_code
from spvtpm.wire.instance_content import Policy
from spvtpm.wire.introductions import Introduce, Knock, Papers, encode_clear
from spvtpm.wire.messages import Endorsement, ErrorReply
from spvtpm.wire.owner_certificates import parse_owner_certificate
from spvtpm.wire.owner_messages import (
    MAX_OWNER_MESSAGE_BYTES,
    PIECE_BYTES,
    AcknowledgeExport,
    AskFate,
    DestroyVm,
    Done,
    Event,
    Events,
    ExportBegins,
    ExportVtpm,
    Fate,
    GetEndorsement,
    ImportVtpm,
    ListMine,
    MyVm,
    MyVms,
    NewVtpm,
    OwnerReply,
    OwnerRequest,
    Piece,
    Provision,
    ReadEvents,
    Rotated,
    RotateUserSecret,
    encode_owner_message,
    parse_owner_reply,
)

MAX_MY_VMS = 100_000
"""As many VMs as a secure processor can have; who announces more pages is not waited for."""

TIMEOUT_S = 120.0
Progress = Callable[[int, int], None]
"""Told how many bytes of a file are through, and of how many."""

_Reply = TypeVar("_Reply", bound=OwnerReply)


def no_progress(_done: int, _total: int) -> None:
    """For those who do not watch."""


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """An instance file as it came, whole.

    Attributes:
        begins: what was announced.
        content: the file; encrypted.
        sha256: of it, 32 bytes.
    """

    begins: ExportBegins
    content: bytes
    sha256: bytes


class OwnerSession:
    """An open channel to a verified secure processor. Life: `open` → requests → `close`; after an error of the channel, dead.

    Attributes:
        verified: who is on the other side.
        has_refused: whether the secure processor itself has refused a request, inside the channel.
    """

    def __init__(self, conversation: Conversation, verified: Verified) -> None:
        self._conversation = conversation
        self.verified = verified
        self.has_refused = False

    @classmethod
    def open(
        cls,
        way: OpenRelay,
        key: EllipticCurvePrivateKey,
        certificate: bytes,
        verify: Callable[[Sequence[bytes]], Verified],
        timeout_s: float = TIMEOUT_S,
    ) -> Self:
        """Knocks, verifies, introduces itself, and opens the channel.

        Args:
            way: to the secure processor.
            key: the owner's.
            certificate: the owner's, DER.
            verify: the chain that the other side shows, or raises.
            timeout_s: how long each message may take.

        Raises:
            SpvtpmError: no relay takes the connection.
            CertificateError, CertificateRefused: what answers is not a secure processor as demanded. Nothing was sent to it.
            ChannelError, MessageError, FrameError: something between the two sides does not do what it should.
        """
        relay = way(timeout_s)
        try:
            relay.send([encode_clear(Knock())])
            papers = hear_clear(relay, Papers)
            verified = verify(papers.chain)
            relay.send([encode_clear(Introduce(certificate))])
            channel = SecureChannel(
                key,
                parse_owner_certificate(certificate),
                papers.chain[0],
                is_server=False,
                max_message_bytes=MAX_OWNER_MESSAGE_BYTES,
            )
            conversation = Conversation(relay, channel)
            conversation.shake_hands()
        except BaseException:
            relay.close()
            raise
        return cls(conversation, verified)

    def provision_new(
        self,
        vm_id: uuid.UUID,
        user_secret: bytes,
        vm_key: bytes,
        policy: Policy,
        label: str,
        *,
        inject_key: bool = False,
    ) -> MyVm:
        """Makes a VM whose vTPM begins in the default state.

        Args:
            vm_id: the VM.
            user_secret: 32 bytes.
            vm_key: 32 bytes.
            policy: what is allowed.
            label: the owner's words.
            inject_key: whether the secure processor hands the VM key to the VM, once for each boot.

        Raises:
            SpvtpmError: the SP's refusal, as the class its code names; or the channel broke. So all requests.
        """
        vtpm = NewVtpm(policy=policy, label=label)
        secrets = {"user_secret": user_secret, "vm_key": vm_key}
        vm = self._ask(Provision(vm_id=vm_id, vtpm=vtpm, inject_key=inject_key, **secrets), MyVm)
        return _about(vm, vm.vm_id == vm_id)

    def provision_import(
        self,
        vm_id: uuid.UUID,
        user_secret: bytes,
        vm_key: bytes,
        file: bytes,
        newest_version: int,
        progress: Progress = no_progress,
        *,
        inject_key: bool = False,
    ) -> MyVm:
        """Makes a VM whose vTPM comes out of a file. After a refusal the session is closed: pieces may still be under way."""
        vtpm = ImportVtpm(size_bytes=len(file), newest_version=newest_version)
        try:
            secrets = {"user_secret": user_secret, "vm_key": vm_key}
            self._ask(Provision(vm_id=vm_id, vtpm=vtpm, inject_key=inject_key, **secrets), Done)
            for at in range(0, len(file), PIECE_BYTES):
                self._send(Piece(data=file[at : at + PIECE_BYTES]))
                progress(min(at + PIECE_BYTES, len(file)), len(file))
            vm = self._receive(MyVm)
        except SpvtpmError:
            self.close()
            raise
        return _about(vm, vm.vm_id == vm_id)

    def export(self, vm_id: uuid.UUID, progress: Progress = no_progress) -> ReceivedFile:
        """Has a stopped or hibernated VM's vTPM given out. Nothing is destroyed yet."""
        begins = self._ask(ExportVtpm(vm_id=vm_id), ExportBegins)
        file, digest = bytearray(), hashlib.sha256()
        while len(file) < begins.size_bytes:
            piece = self._receive(Piece).data
            file += piece
            digest.update(piece)
            if len(file) > begins.size_bytes:
                raise InstanceFileError("the instance file is longer than announced")
            progress(len(file), begins.size_bytes)
        return ReceivedFile(begins, bytes(file), digest.digest())

    def acknowledge(self, vm_id: uuid.UUID, received: ReceivedFile) -> Fate:
        """Says that the file is here, whole and durable; security block, vTPM and secrets are destroyed then."""
        begins = received.begins
        fate = self._ask(AcknowledgeExport(vm_id=vm_id, version=begins.version, sha256=received.sha256), Fate)
        told = (fate.vtpm_id, fate.state, fate.version, fate.sha256)
        return _about(fate, told == (begins.vtpm_id, "exported", begins.version, received.sha256))

    def destroy(self, vm_id: uuid.UUID) -> None:
        """Has a VM's security block, vTPM and secrets destroyed without an export, for good."""
        self._ask(DestroyVm(vm_id=vm_id), Done)

    def rotate(self, user_secret: bytes) -> int:
        """Another `UserSecret` for all this owner's VMs there; how many have it now."""
        return self._ask(RotateUserSecret(user_secret=user_secret), Rotated).vms

    def list_mine(self) -> list[MyVm]:
        """All of this owner's VMs there, by id."""
        vms: list[MyVm] = []
        while True:
            page = self._ask(ListMine(after=vms[-1].vm_id if vms else None), MyVms)
            ids = [vm.vm_id for vm in [*vms[-1:], *page.vms]]
            _about(page, all(first < second for first, second in pairwise(ids)))
            vms += page.vms
            if not page.more or not page.vms or len(vms) > MAX_MY_VMS:
                return vms

    def find(self, vm_id: uuid.UUID) -> MyVm | None:
        """One of this owner's VMs there, if it is: the first of those behind the id before."""
        before = uuid.UUID(int=vm_id.int - 1) if vm_id.int else None
        page = self._ask(ListMine(after=before), MyVms)
        return next((vm for vm in page.vms if vm.vm_id == vm_id), None)

    def ask_fate(self, vtpm_id: uuid.UUID) -> Fate:
        """What became of a vTPM there."""
        fate = self._ask(AskFate(vtpm_id=vtpm_id), Fate)
        return _about(fate, fate.vtpm_id == vtpm_id)

    def events(self, vm_id: uuid.UUID) -> list[Event]:
        """The newest events of a VM, oldest first."""
        return self._ask(ReadEvents(vm_id=vm_id), Events).events

    def endorsement(self, vm_id: uuid.UUID) -> Endorsement:
        """The certificates of a VM's vTPM's endorsement keys."""
        return self._ask(GetEndorsement(vm_id=vm_id), Endorsement)

    def close(self) -> None:
        """Says that nothing more comes, and ends the connection."""
        self._conversation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: OwnerRequest, kind: type[_Reply]) -> _Reply:
        self._send(request)
        return self._receive(kind)

    def _send(self, request: OwnerRequest) -> None:
        self._conversation.send(encode_owner_message(request))

    def _receive(self, kind: type[_Reply]) -> _Reply:
        reply = parse_owner_reply(self._conversation.receive())
        if isinstance(reply, ErrorReply):
            self.has_refused = True
            raise error_from_code(reply.code, printable(reply.message))
        if not isinstance(reply, kind):
            raise MessageError(f"the secure processor answered with {type(reply).__name__}, not with {kind.__name__}")
        return reply


def _about(reply: _Reply, is_answer: bool) -> _Reply:
    if not is_answer:
        raise MessageError(f"the secure processor's {type(reply).__name__} is not about what was asked")
    return reply
