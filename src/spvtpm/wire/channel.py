"""The confidential channel: TLS 1.3 in frames that a relay carries and cannot read. Does no I/O: frames in, frames out.

Both ends introduce themselves in clear first, so that each can trust exactly one certificate in the handshake:

    owner -> SP    Knock
    SP -> owner    Papers        the SP's certificate chain; the owner verifies it before it says anything of itself
    owner -> SP    Introduce     the owner's self-signed certificate
    both           TLS records   the SP as server, with the certificate that it showed; the owner as client, with its own

What is said in clear (`introductions.py`) is believed by nobody: a relay that changes it makes the handshake fail. In TLS, each
message is a frame of its own (`framing.py`). No resumption, no early data, no version but 1.3.

Source: RFC 8446. Format: docs/formats/channel.md.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import Certificate

from spvtpm.wire.errors import ChannelError
from spvtpm.wire.framing import FrameDecoder, encode_frames
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

_RECORD_BYTES: Final = 1 << 14
"""The most that a TLS record carries. Source: RFC 8446, section 5.1."""


class ChannelEnded(ChannelError):
    """The other side has closed the channel, in order."""


class SecureChannel:
    """One end of a channel after the introductions. Life: construct → `frames()` to the relay, `receive()` from it … → `close()`.

    After an error the channel is dead.

    Args:
        key: this side's private key.
        certificate: this side's certificate.
        peer: the only certificate that the other side may show, DER.
        is_server: whether this is the SP.
        max_message_bytes: the longest message that the other side may send.
    """

    def __init__(
        self,
        key: EllipticCurvePrivateKey,
        certificate: Certificate,
        peer: bytes,
        *,
        is_server: bool,
        max_message_bytes: int,
    ) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            context = _context(key, certificate, peer, is_server=is_server)
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        except (ssl.SSLError, ValueError) as error:
            raise ChannelError(f"no channel can be opened with this certificate: {_reason(error)}") from None
        self._decoder = FrameDecoder(max_message_bytes)
        self.is_open = False
        if not is_server:
            self._shake_hands()

    def receive(self, frame: bytes) -> list[bytes]:
        """Takes what the relay brought; gives the messages that it completes.

        Raises:
            ChannelError: the handshake failed, or a record is not authentic, or the other side has closed the channel.
            FrameError: a message is too long.
        """
        self._incoming.write(frame)
        if not self.is_open and not self._shake_hands():
            return []
        return self._read()

    def send(self, *messages: bytes) -> None:
        """Encrypts messages; `frames()` has them then.

        Raises:
            ChannelError: the channel is not open.
        """
        if not self.is_open:
            raise ChannelError("the channel is not open")
        with _told():
            self._tls.write(encode_frames(messages))

    def frames(self) -> list[bytes]:
        """What the relay has to carry now."""
        data = self._outgoing.read()
        return [data[at : at + MAX_CHANNEL_FRAME_BYTES] for at in range(0, len(data), MAX_CHANNEL_FRAME_BYTES)]

    def close(self) -> None:
        """Says that nothing more comes; `frames()` has it then."""
        if self.is_open:
            self.is_open = False
            with suppress(ssl.SSLError):  # the other side has not said so yet, and need not
                self._tls.unwrap()

    def _shake_hands(self) -> bool:
        with _told():
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return False
        self.is_open = True
        return True

    def _read(self) -> list[bytes]:
        pieces: list[bytes] = []
        with _told():
            try:
                while piece := self._tls.read(_RECORD_BYTES):
                    pieces.append(piece)
            except ssl.SSLWantReadError:
                return self._decoder.feed(b"".join(pieces))
        self.is_open = False
        messages = self._decoder.feed(b"".join(pieces))
        if messages:  # last words count; whoever listens on hears of the end
            return messages
        raise ChannelEnded("the other side has closed the channel")


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        raise ChannelError(f"the channel broke: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """OpenSSL's word for it, without the place in its source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the other side's certificate is not the one that it showed ({error.verify_message})"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return "it is no certificate, or no key"


def _context(key: EllipticCurvePrivateKey, certificate: Certificate, peer: bytes, *, is_server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # an SP has no host name: `peer` is the one certificate that will do
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=peer)
    if is_server:
        context.num_tickets = 0
    _load_key(context, key, certificate)
    return context


def _load_key(context: ssl.SSLContext, key: EllipticCurvePrivateKey, certificate: Certificate) -> None:
    """Python's ssl takes keys from files alone; this one is in memory, and gone when it has been read."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    descriptor = os.memfd_create("channel-key", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)
