"""Targets for the confidential channel: TLS through a relay that lies, and another side that says anything."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from tests.owner import Owner
from tests.papers import DAY, papers

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.wire.certificate_building import Validity, build_channel_certificate
from spvtpm.wire.certificate_extensions import ChannelIdentity, Features
from spvtpm.wire.certificates import LONGEST_CHANNEL_VALIDITY
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.errors import ChannelError, FrameError
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES

_LONGEST_MESSAGE = 4096


@cache
def _ends() -> tuple[Owner, ec.EllipticCurvePrivateKey, x509.Certificate]:
    """An owner, and a secure processor's channel key with its certificate, valid today."""
    key = ec.generate_private_key(ec.SECP256R1())
    identity = ChannelIdentity(papers().made.chip_id, 1, Features.VTPM)
    start = datetime.now(UTC) - DAY
    certificate = build_channel_certificate(
        papers().chip, key.public_key(), identity, Validity.lasting(start, LONGEST_CHANNEL_VALIDITY)
    )
    return Owner(), key, certificate


class _End:
    """One side: what it has sent, what it has received, and whether the channel broke for it."""

    def __init__(self, channel: SecureChannel) -> None:
        self.channel = channel
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self.outgoing: list[bytes] = []
        self.broken = False

    def say(self, message: bytes) -> None:
        if self.channel.is_open and not self.broken:
            self.channel.send(message)
            self.sent.append(message)
            self.outgoing += self.channel.frames()

    def hear(self, frame: bytes) -> None:
        if self.broken:
            return
        try:
            self.received += self.channel.receive(frame)
        except (ChannelError, FrameError):
            self.broken = True
        self.outgoing += self.channel.frames()


def _new_ends() -> tuple[_End, _End]:
    who, key, certificate = _ends()
    shown, mine = certificate.public_bytes(Encoding.DER), who.certificate
    client = SecureChannel(who.key, mine, shown, is_server=False, max_message_bytes=_LONGEST_MESSAGE)
    server = SecureChannel(
        key, certificate, mine.public_bytes(Encoding.DER), is_server=True, max_message_bytes=_LONGEST_MESSAGE
    )
    ends = _End(client), _End(server)
    ends[0].outgoing += client.frames()
    return ends


def _deliver_all(ends: tuple[_End, _End]) -> None:
    while any(end.outgoing for end in ends):
        for end, other in (ends, ends[::-1]):
            frames, end.outgoing = end.outgoing, []
            for frame in frames:
                other.hear(frame)


def fuzz_channel(data: bytes) -> None:
    """A relay alters, repeats, drops, swaps and invents frames: each side hears what the other said, in order, or nothing."""
    program = Program(data)
    ends = _new_ends()
    if program.below(2):
        _deliver_all(ends)
        assert all(end.channel.is_open for end in ends), "an honest relay opens the channel"
    for _ in range(40):
        if not program:
            break
        _lie(program, *program.choose((ends, ends[::-1])))
    for end, other in (ends, ends[::-1]):
        assert other.received == end.sent[: len(other.received)], "what is heard was said, in this order"


def _lie(program: Program, end: _End, other: _End) -> None:
    what = program.below(8)
    if what == 0:
        end.say(program.take(1 + program.below(_LONGEST_MESSAGE)) or b"!")
    elif what == 1:
        other.hear(program.take(program.below(200)))
    elif end.outgoing:
        frame = end.outgoing.pop(0)
        if what == 2:
            other.hear(program.damage(frame)[:MAX_CHANNEL_FRAME_BYTES])
        elif what == 3:
            other.hear(frame)
            other.hear(frame)
        elif what == 4:
            end.outgoing.append(frame)
        elif what > 5:
            other.hear(frame)


def fuzz_hostile_end(data: bytes) -> None:
    """The other side of an open channel says anything at all: messages within their bounds, or a typed error."""
    program = Program(data)
    ends = _new_ends()
    _deliver_all(ends)
    hostile, honest = program.choose((ends, ends[::-1]))
    while program and not honest.broken:
        hostile.channel._tls.write(program.take(1 + program.below(600)) or b"\0")
        hostile.outgoing += hostile.channel.frames()
        _deliver_all(ends)
    assert all(1 <= len(message) <= _LONGEST_MESSAGE for message in honest.received), "messages are bounded"


def _relayed() -> Sequence[bytes]:
    """Nothing but honest deliveries; a message each way; and each lie once."""
    honest, lies = bytes([0, 0, 6, 1, 6] * 8), [bytes([1, 0, 0, 4, 104, 105, 0, 7, what]) for what in range(8)]
    return [honest, b"\1\0\0\5\0hello\0\6\1\0\5\0hello\1\6", *lies]


CHANNEL_TARGETS = (
    Target("channel", "TLS through a relay that lies", fuzz_channel, _relayed, examples=150),
    Target("hostile_end", "an open channel's other side", fuzz_hostile_end, lambda: [b"\1\5\0\0\0\0\1!"], examples=100),
)
