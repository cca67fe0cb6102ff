"""Targets for what arrives on sockets: frames, TPM commands on a stream, swtpm's control requests, ivshmem offers."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence

from tests import tpm_commands as tpm

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.wire import framing, ivshmem, tpm_stream
from spvtpm.wire.errors import FrameError, InterfaceError
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.ivshmem import Offer, OfferParser
from spvtpm.wire.swtpm_control import ControlCommand, answer_control, is_cut_off, parse_request
from spvtpm.wire.tpm_stream import CommandDecoder


def _pieces(program: Program, stream: bytes) -> list[bytes]:
    sizes = [1 + program.below(64) for _ in range(program.below(16))]
    pieces = []
    for size in sizes:
        pieces.append(stream[:size])
        stream = stream[size:]
    return [*pieces, stream]


def _decoded(feed: Callable[[bytes], list[bytes]], pieces: Iterable[bytes]) -> tuple[list[bytes], bool]:
    """What the pieces gave, and whether the stream was refused."""
    found: list[bytes] = []
    for piece in pieces:
        try:
            found += feed(piece)
        except FrameError:
            return found, True
    return found, False


def _agree(
    make: Callable[[], FrameDecoder | CommandDecoder], program: Program, stream: bytes
) -> tuple[list[bytes], bool]:
    """Feeds a stream in one piece, byte by byte and in any pieces: the same frames come out of it, to the same end."""
    bytewise, refused = _decoded(make().feed, (stream[at : at + 1] for at in range(len(stream))))
    pieces, refused_pieces = _decoded(make().feed, _pieces(program, stream))
    whole, refused_whole = _decoded(make().feed, [stream])
    assert refused == refused_pieces == refused_whole, "the same stream is refused however it arrives"
    assert pieces == bytewise[: len(pieces)], "the same frames come out in pieces"
    assert refused or bytewise == pieces == whole, "the same frames come out of one piece"
    return bytewise, refused


def fuzz_framing(data: bytes) -> None:
    """Length-prefixed frames."""
    program = Program(data)
    bound = program.choose((framing.MAX_FRAME_BYTES, 4096, 16))
    stream = b"".join(
        program.damage(encode_frame(program.take(1 + program.below(40)) or b"\0")) for _ in range(program.below(5))
    )
    stream += program.rest()
    frames, refused = _agree(lambda: FrameDecoder(bound), program, stream)
    consumed = b"".join(map(encode_frame, frames))
    assert stream.startswith(consumed), "what was decoded encodes to what arrived"
    decoder = FrameDecoder(bound)
    if refused:
        return
    decoder.feed(stream)
    try:
        decoder.finish()
    except FrameError:
        assert stream != consumed, "a stream of whole frames ends well"
    else:
        assert stream == consumed, "a stream may not end inside a frame"


def fuzz_tpm_stream(data: bytes) -> None:
    """TPM commands on a byte stream."""
    program = Program(data)
    good = (tpm.startup(), tpm.get_random(16), tpm.create_primary(tpm.ecc_p256()), tpm.pcr_extend(1, bytes(32)))
    stream = b"".join(program.damage(program.choose(good)) for _ in range(program.below(5))) + program.rest()
    commands, _refused = _agree(CommandDecoder, program, stream)
    assert stream.startswith(b"".join(commands)), "commands are pieces of the stream, without gaps"
    for command in commands:
        (size,) = struct.unpack_from(">I", command, 2)
        assert tpm_stream.HEADER.size <= size == len(command) <= tpm_stream.MAX_COMMAND_BYTES, (
            "a command is as announced"
        )


def fuzz_swtpm_control(data: bytes) -> None:
    """Control requests of swtpm's clients: every request has an answer."""
    answer, command = answer_control(data)
    (result,) = struct.unpack_from(">I", answer)
    assert len(answer) == (8 if result == 0 and data[:4] == b"\0\0\0\1" else 4), "only capabilities have a body"
    assert command in (None, ControlCommand.CANCEL_TPM_CMD), "power and state are not the client's to control"
    assert result == 0 or command is None, "what is refused is not carried out"
    request = parse_request(data)
    if is_cut_off(data):
        assert request is None, "a request is whole"
    elif request is not None:
        assert data == struct.pack(">I", request.code) + request.body, "a request is what came"
        assert request.code != ControlCommand.SET_BUFFERSIZE or request.number >= 0, "a size is there"


def fuzz_ivshmem(data: bytes) -> None:
    """An ivshmem server's messages: only the one right order makes an offer, of the descriptors that came."""
    program = Program(data)
    parser = OfferParser()
    sent: list[tuple[bytes, int | None]] = []
    while program:
        kind = program.below(4)
        if kind < 3:
            message = struct.pack("<q", program.choose((-1, 0, 1, 2, 0xFFFF, 0x10000, -2)))
        else:
            message = program.take(program.below(10))
        descriptor = 100 + len(sent) if program.below(2) else None
        sent.append((message, descriptor))
        try:
            offer = parser.feed(message, descriptor)
        except InterfaceError:
            return
        if offer is not None:
            _check_offer(offer, sent)
            return


def _check_offer(offer: Offer, sent: list[tuple[bytes, int | None]]) -> None:
    expected = ivshmem.encode_offer(offer)
    own = sent[1][0]
    wanted = [expected[0], (own, None), *expected[2:4], (own, offer.vm_doorbell)]
    assert sent == wanted, "an offer is what a server of this protocol sends, and nothing else"
    assert len(set(offer)) == len(offer), "each descriptor is used once"


def _seeds_framing() -> Sequence[bytes]:
    return (
        b"\0\0" + encode_frame(b"one") + encode_frame(b"a longer frame") + encode_frame(bytes(200)),
        b"\2\0\0\0\0\x11",
        b"\0\0\xff\xff\xff\xff",
        b"\0\0" + encode_frame(b"cut off")[:-3],
    )


def _seeds_control() -> Sequence[bytes]:
    return [struct.pack(">I", code) + body for code in (1, 5, 9, 2, 0x10) for body in (b"", b"\0", bytes(4), b"\1")]


def _seeds_ivshmem() -> Sequence[bytes]:
    """The one good offer: version 0, number 1, then memory and doorbells, each with a descriptor."""
    return (bytes.fromhex("000100 000200 000001 000101 000201"), bytes.fromhex("000100 000300 000001 000101 000301"))


def _seeds_tpm_stream() -> Sequence[bytes]:
    return (b"\0" + tpm.startup() + tpm.get_random(8), b"\0" + tpm.get_random(8)[:-1], b"\0\x80\1\0\0\0\0\0\0\0\0")


STREAM_TARGETS = (
    Target("framing", "length-prefixed frames (FrameDecoder)", fuzz_framing, _seeds_framing),
    Target("tpm_stream", "TPM commands on a byte stream (CommandDecoder)", fuzz_tpm_stream, _seeds_tpm_stream),
    Target("swtpm_control", "control requests of swtpm's clients", fuzz_swtpm_control, _seeds_control, longest=128),
    Target("ivshmem", "an ivshmem server's offer (OfferParser)", fuzz_ivshmem, _seeds_ivshmem, longest=256),
)
