"""An owner for tests: says exactly what it is told to, in a real channel to a real secure processor."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.errors import error_from_code
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.instance_content import Policy
from spvtpm.wire.introductions import (
    MAX_CHANNEL_FRAME_BYTES,
    ClearMessage,
    Introduce,
    Knock,
    Papers,
    encode_clear,
    parse_clear,
)
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.owner_certificates import build_owner_certificate, fingerprint
from spvtpm.wire.owner_messages import (
    MAX_OWNER_MESSAGE_BYTES,
    PIECE_BYTES,
    AcknowledgeExport,
    AskFate,
    Done,
    ExportBegins,
    ExportVtpm,
    Fate,
    ImportVtpm,
    MyVm,
    NewVtpm,
    OwnerReply,
    OwnerRequest,
    Piece,
    Provision,
    encode_owner_message,
    parse_owner_reply,
)

ANYTHING = Policy(migration_allowed=True, chips=None, minimum_firmware=0, direct_path_only=False, pcr_banks=frozenset())
_Reply = TypeVar("_Reply", bound=OwnerReply)


@dataclass(frozen=True)
class Owner:
    """A key and a secret.

    Attributes:
        key: on P-384.
        user_secret: 32 bytes.
    """

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    user_secret: bytes = field(default_factory=lambda: os.urandom(32))

    @property
    def certificate(self) -> x509.Certificate:
        """For the channel."""
        return build_owner_certificate(self.key)

    @property
    def fingerprint(self) -> bytes:
        """Who this is."""
        return fingerprint(self.certificate)

    def provision(
        self, vm_id: uuid.UUID, vm_key: bytes, vtpm: NewVtpm | ImportVtpm | None = None, *, inject_key: bool = False
    ) -> Provision:
        """What makes a VM; with a new vTPM unless told otherwise."""
        vtpm = vtpm or NewVtpm(policy=ANYTHING)
        return Provision(vm_id=vm_id, user_secret=self.user_secret, vm_key=vm_key, vtpm=vtpm, inject_key=inject_key)


class OwnerChannel:
    """An open channel. It believes any papers: what the terminal checks is tested with the terminal.

    Args:
        path: of the SP's channel socket.
        owner: who speaks.
    """

    def __init__(self, path: Path, owner: Owner) -> None:
        self.owner = owner
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(60)
        self._decoder = FrameDecoder(MAX_CHANNEL_FRAME_BYTES)
        self._frames: list[bytes] = []
        self._messages: list[bytes] = []
        try:
            self._socket.connect(str(path))
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.send_frames([encode_clear(Knock())])
        self.papers = self._clear(Papers)
        certificate = self.owner.certificate
        self.send_frames([encode_clear(Introduce(certificate.public_bytes(Encoding.DER)))])
        self.channel = SecureChannel(
            self.owner.key,
            certificate,
            self.papers.chain[0],
            is_server=False,
            max_message_bytes=MAX_OWNER_MESSAGE_BYTES,
        )
        while not self.channel.is_open:
            self.send_frames(self.channel.frames())
            self.channel.receive(self.frame())
        self.send_frames(self.channel.frames())

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """Gives frames to the relay."""
        with suppress(BrokenPipeError):  # whoever was turned away can still read why
            for frame in frames:
                self._socket.sendall(encode_frame(frame))

    def frame(self) -> bytes:
        """The next frame from the relay.

        Raises:
            ConnectionError: there is none.
        """
        while not self._frames:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def _clear(self, kind: type[Papers]) -> Papers:
        message: ClearMessage = parse_clear(self.frame())
        if isinstance(message, ErrorReply):
            raise error_from_code(message.code, message.message)
        assert isinstance(message, kind)
        return message

    def say(self, request: OwnerRequest) -> None:
        """Sends a request."""
        self.channel.send(encode_owner_message(request))
        self.send_frames(self.channel.frames())

    def hear(self) -> OwnerReply:
        """The next reply; a refusal is raised."""
        while not self._messages:
            self._messages += self.channel.receive(self.frame())
        reply = parse_owner_reply(self._messages.pop(0))
        if isinstance(reply, ErrorReply):
            raise error_from_code(reply.code, reply.message)
        return reply

    def ask(self, request: OwnerRequest, kind: type[_Reply]) -> _Reply:
        """One request, one reply of this kind."""
        self.say(request)
        reply = self.hear()
        assert isinstance(reply, kind), reply
        return reply

    def provision(self, vm_id: uuid.UUID, vm_key: bytes, policy: Policy = ANYTHING, label: str = "") -> MyVm:
        """A VM that will get a new vTPM."""
        return self.ask(self.owner.provision(vm_id, vm_key, NewVtpm(policy=policy, label=label)), MyVm)

    def take_export(self, vm_id: uuid.UUID) -> tuple[ExportBegins, bytes]:
        """The file, not acknowledged."""
        begins = self.ask(ExportVtpm(vm_id=vm_id), ExportBegins)
        file = b""
        while len(file) < begins.size_bytes:
            piece = self.hear()
            assert isinstance(piece, Piece)
            file += piece.data
        assert len(file) == begins.size_bytes
        return begins, file

    def acknowledge(self, vm_id: uuid.UUID, begins: ExportBegins, file: bytes) -> Fate:
        """Has what was exported destroyed."""
        sha256 = hashlib.sha256(file).digest()
        return self.ask(AcknowledgeExport(vm_id=vm_id, version=begins.version, sha256=sha256), Fate)

    def export(self, vm_id: uuid.UUID) -> bytes:
        """The file; what it was made of is gone."""
        begins, file = self.take_export(vm_id)
        assert self.acknowledge(vm_id, begins, file).state == "exported"
        return file

    def bring(self, vm_id: uuid.UUID, vm_key: bytes, file: bytes, newest_version: int = 0) -> MyVm:
        """A VM whose vTPM comes out of the file."""
        announced = ImportVtpm(size_bytes=len(file), newest_version=newest_version)
        self.ask(self.owner.provision(vm_id, vm_key, announced), Done)
        pieces = [Piece(data=file[at : at + PIECE_BYTES]) for at in range(0, len(file), PIECE_BYTES)]
        for piece in pieces[:-1]:
            self.say(piece)
        return self.ask(pieces[-1], MyVm)

    def fate(self, vtpm_id: uuid.UUID) -> Fate:
        """What became of a vTPM."""
        return self.ask(AskFate(vtpm_id=vtpm_id), Fate)

    def close(self) -> None:
        """Ends the channel."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
