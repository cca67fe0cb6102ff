"""Targets for an emulated VM: what its owner's console and its hypervisor say, and the memory image that comes back."""

from __future__ import annotations

import io
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.guest.memory_image import open_image, pack, seal, unpack
from spvtpm.wire import console
from spvtpm.wire import machine_control as control
from spvtpm.wire.errors import MessageError, StorageError
from spvtpm.wire.memory_records import NewestRecords, PageLedger, parse_record, parse_stream, split_records
from spvtpm.wire.memory_stream import PageSealer, open_stream, seal_final, verify_final
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.platform_errors import ImageDamaged, MemoryStreamDamaged

T = TypeVar("T")
_VM, _KEY = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8"), b"k" * 32

_REQUESTS: Sequence[console.ConsoleRequest] = (
    console.Run(arguments=("tpm2_pcrread", "sha256:0")),
    console.Input(data=b"piece"),
    console.EndOfInput(),
    console.Taken(pieces=console.WINDOW_PIECES),
)
_REPLIES: Sequence[console.ConsoleReply] = (
    console.Output(stream="stdout", data=b"piece"),
    console.Output(stream="stderr", data=b"piece"),
    console.Taken(pieces=1),
    console.Ended(code=137),
    ErrorReply("bad-message", "not understood"),
)
_CONTROL: Sequence[control.ControlRequest] = (
    control.AwaitReady(),
    control.PowerOff(),
    control.Suspend(),
    control.CopyMemory(handoff_id=b"h" * 16),
    control.Halt(),
    control.FinishCopy(handoff_id=b"h" * 16, stop_nonce=b"s" * 32),
    control.GoOn(),
)
_STATES: Sequence[control.ControlReply] = (
    control.MachineState(vm_id=_VM, state="running"),
    control.MemoryCopied(vm_id=_VM, records=3, bytes=70_000),
    ErrorReply("wrong-state", "it is off"),
)
_KINDS = {type(message).__name__ for message in (*_REQUESTS, *_REPLIES, *_CONTROL, *_STATES)}
_WORDS = [bytes([0xA0 | len(word)]) + word.encode() for word in sorted(_KINDS)]


def _round_trip(parse: Callable[[bytes], T], encode: Callable[[T], bytes], data: bytes) -> None:
    """What parses is a message, and its own encoding says the same."""
    try:
        message = parse(data)
    except MessageError as error:
        str(error).encode()
        return
    assert parse(encode(message)) == message, "what is parsed encodes to the same message"


def fuzz_memory_image(data: bytes) -> None:
    """An image that was kept by others: it opens if it is the sealed one, and never otherwise."""
    program = Program(data)
    archive = program.take(program.below(200))
    image = seal(_KEY, _VM, archive)
    changed = program.damage(image)
    for candidate in (changed, program.rest()):
        try:
            opened = open_image(_KEY, _VM, candidate)
        except ImageDamaged:
            assert candidate != image, "what was sealed opens"
        else:
            assert candidate == image and opened == archive, "what was altered is refused"


_HANDOFF, _STOP = b"h" * 16, b"s" * 32


def fuzz_memory_stream(data: bytes) -> None:
    """Memory on its way: it is what was there last, whatever is done to its records, or it does not open."""
    program = Program(data)
    older, newer = program.take(program.below(100)), program.take(program.below(100))
    sealer, ledger = PageSealer(_KEY, _HANDOFF), PageLedger()
    records = [sealer.seal(0, page) for page in (older, newer) if page]
    for record in records:
        ledger.take(parse_record(record))
    newest = newer or older
    final = seal_final(_KEY, _HANDOFF, _STOP, ledger, len(newest))
    sent = [program.damage(program.choose(records)) for _ in range(program.below(3))] if records else []
    for candidates, is_whole in (([*sent, program.damage(final)], False), ([*records, final], True)):
        gathered = NewestRecords()
        try:
            for candidate in candidates:
                gathered.take(candidate)
            opened = open_stream(_KEY, _HANDOFF, _STOP, gathered.stream())
        except MemoryStreamDamaged:
            assert not is_whole, "what is whole opens"
        else:
            assert opened == newest, "what opens is what was there last"


def fuzz_memory_records(data: bytes) -> None:
    """Records and files of them, from anybody: parsed whole, or a typed error; and nothing verifies."""
    ledger = PageLedger()
    for parse in (parse_record, parse_stream):
        try:
            parse(data)
        except MemoryStreamDamaged as error:
            str(error).encode()
    try:
        records = list(split_records(data))
    except MemoryStreamDamaged:
        return
    assert b"".join(record.data for record in records) == data, "nothing is left over"
    for record in records:
        try:
            ledger.take(record)
        except MemoryStreamDamaged:
            assert record.index == 0, "a final record"
        try:
            verify_final(_KEY, _HANDOFF, _STOP, ledger, record.data)
        except MemoryStreamDamaged:
            continue
        raise AssertionError("what nobody has sealed verifies")


def _records() -> Sequence[bytes]:
    sealer, ledger = PageSealer(b"x" * 32, _HANDOFF), PageLedger()
    pages = [sealer.seal(index, b"page") for index in (0, 1, 0)]
    ledger.take(parse_record(pages[-1]))
    records = [*pages, seal_final(b"x" * 32, _HANDOFF, _STOP, ledger, 4)]
    return [b"".join(records), b"SPVTPMST\1\0" + _HANDOFF + _STOP + b"".join(records)]


def fuzz_memory_archive(data: bytes) -> None:
    """Whatever an archive says: files below its directory, which can be packed again, or a typed error."""
    with tempfile.TemporaryDirectory() as name:
        (directory := Path(name, "memory")).mkdir()
        try:
            unpack(data, directory)
        except (ImageDamaged, StorageError):
            pass
        else:
            pack(directory)
        assert [path.name for path in Path(name).iterdir()] == ["memory"], "nothing is made outside"
        assert not any(path.is_symlink() for path in directory.rglob("*")), "no link is made"


def _archives() -> Sequence[bytes]:
    found = []
    for shape in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=shape) as tar:
            for name, kind in (("a", tarfile.DIRTYPE), ("a/file", tarfile.REGTYPE), ("n" * 200, tarfile.REGTYPE)):
                entry = tarfile.TarInfo(name)
                entry.type, entry.size = kind, 3 if kind == tarfile.REGTYPE else 0
                entry.mode = 0o755
                tar.addfile(entry, io.BytesIO(b"xyz"))
        found.append(sink.getvalue()[:5120])
    return found


def _encoded(encode: Callable[[T], bytes], all_of: Sequence[T]) -> Callable[[], Sequence[bytes]]:
    return lambda: [encode(message) for message in all_of]


def _message_target(
    name: str, about: str, parse: Callable[[bytes], T], encode: Callable[[T], bytes], good: Sequence[T]
) -> Target:
    run = partial(_round_trip, parse, encode)
    return Target(name, about, run, _encoded(encode, good), _WORDS, longest=1024)


_say = console.encode_console_message
MACHINE_TARGETS = (
    _message_target("console_requests", "an owner to a VM", console.parse_console_request, _say, _REQUESTS),
    _message_target("console_replies", "a VM to its owner", console.parse_console_reply, _say, _REPLIES),
    _message_target(
        "control", "an agent to a machine", control.parse_control_request, control.encode_control, _CONTROL
    ),
    _message_target(
        "machine_states", "a machine to its agent", control.parse_control_reply, control.encode_control, _STATES
    ),
    Target("memory_image", "a hibernated VM's memory, sealed", fuzz_memory_image, lambda: [b"\x03abc", b"\x03abc\x05"]),
    Target("memory_stream", "a moving VM's memory, sealed", fuzz_memory_stream, lambda: [b"\x03abc\x03xyz\x02"]),
    Target("memory_records", "what carries it", fuzz_memory_records, _records, [b"SPVTPMST", b"\1\1", b"\1\2"]),
    Target("memory_archive", "what is inside", fuzz_memory_archive, _archives, [b"ustar\x0000"], longest=8192),
)
