"""Targets for messages: hypervisor to SP and back, SP to worker and back, frames in VM memory, the stored security block."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from tests.owner import ANYTHING

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.processor.ownership import Ownership
from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.processor.worker import messages as worker
from spvtpm.wire import mailbox, messages
from spvtpm.wire.errors import IntegrityError, MailboxError, MessageError
from spvtpm.wire.mailbox import Direction

T = TypeVar("T")

_VM = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
_KEY, _OTHER_KEY = b"k" * 32, b"o" * 32
_SNAPSHOT = worker.InterfaceSnapshot("READY", True, 0, b"n" * 32, 7, (b"a" * 32, b"b" * 32, b"c" * 32))
_TO_WORKER: Sequence[worker.ToWorker] = (
    worker.Start(worker.DirectPort(b"v" * 16, b"b" * 16, b"k" * 32, _SNAPSHOT), b"permanent", b"volatile"),
    worker.Start(worker.PacketPort()),
    worker.Start(worker.PacketPort(), pcr_banks=["sha256"], reseed=True),
    worker.Endorsed([b"certificate"], (b"chip", b"intermediate", b"root")),
    worker.Committed(),
    worker.Committed("no room"),
    worker.Park(only_if_idle=True),
    worker.PowerOff(),
)
_FROM_WORKER: Sequence[worker.FromWorker] = (
    worker.Endorse([b"public"], 1, 2, 0, 164),
    worker.Commit(b"permanent"),
    worker.Ready(["no Landlock"]),
    worker.Refused(3, 1),
    worker.StillBusy(),
    worker.Parked(b"volatile", _SNAPSHOT),
    worker.Off(),
    worker.Failed("it cannot go on"),
)
_REPLIES: Sequence[messages.Reply] = (
    messages.VmInfo(_VM, "running", 1, messages.VtpmInfo(_VM, "active", "/run/vm.sock", True)),
    messages.VmList([messages.VmInfo(_VM, "stopped", 2, None)]),
    messages.Status("c0" * 16, "0.1.0", 1, 1, 0, ["no Landlock"], 1, 4096),
    messages.Endorsement(vtpm_id=_VM, certificates=(b"ek",), issuer=(b"chip", b"intermediate", b"root")),
    messages.ErrorReply("not-found", "there is no such VM"),
)
_WITH_VM = (
    *(messages.LaunchVm, messages.CreateVtpm, messages.StartVm, messages.ResetVm, messages.StopVm),
    *(messages.HibernateVm, messages.ParkVtpm, messages.WakeVtpm),
)
_REQUESTS: Sequence[messages.Request] = (
    *(request(vm_id=_VM) for request in _WITH_VM),
    messages.GetEndorsement(vm_id=_VM),
    messages.ListVms(),
    messages.GetStatus(),
    messages.AdmitVm(vm_id=_VM),
)
_KINDS = [type(message).__name__ for message in (*_REQUESTS, *_REPLIES, *_TO_WORKER, *_FROM_WORKER)]
_FIELDS = (
    *("type", "version", "vm_id", "with_vtpm", "vtpm_id", "residency", "interface", "connected", "failure", "state"),
    *("boots", "vtpm", "vms", "chip_id", "software", "active", "parked", "missing_protection", "code", "message"),
    *("port", "permanent", "volatile", "snapshot", "boot_id", "boot_key", "granted", "error", "sp_nonce", "sequence"),
    *("session", "only_if_idle", "missing", "count", "reason", "format", "ownership", "owner", "user_secret", "vm_key"),
    *("policy", "label", "hibernated", "events", "time_s", "what", "detail"),
    *(
        "pcr_banks",
        "reseed",
        "certificates",
        "issuer",
        "publics",
        "manufacturer",
        "firmware",
        "level",
        "revision",
    ),
)
_WORDS = [bytes([0xA0 | len(word)]) + word.encode() for word in (*_KINDS, *_FIELDS) if len(word) < 32]
_WORDS += [b"\xc0", b"\xc2", b"\xc3", b"\xff", b"\xca\x7f\xc0\0\0", b"\xcf" + b"\xff" * 8, b"\xc7\x0c\xff", b"\xa1\xff"]


def _round_trip(parse: Callable[[bytes], T], encode: Callable[[T], bytes], data: bytes) -> T | None:
    """What parses is a message, which is given back; its own encoding says the same."""
    try:
        message = parse(data)
    except MessageError as error:
        str(error).encode()
        return None
    assert parse(encode(message)) == message, "what is parsed encodes to the same message"
    return message


def fuzz_requests(data: bytes) -> None:
    """A hypervisor's request."""
    _round_trip(messages.parse_request, messages.encode_message, data)


def fuzz_replies(data: bytes) -> None:
    """The secure processor's answer."""
    reply = _round_trip(messages.parse_reply, messages.encode_message, data)
    if isinstance(reply, messages.Status):
        assert len(reply.chip_id) == 32 and int(reply.chip_id, 16) >= 0, "a chip id is 32 hexadecimal digits"


def fuzz_to_worker(data: bytes) -> None:
    """What the SP says to a worker."""
    _round_trip(worker.parse_to_worker, worker.encode, data)


def fuzz_from_worker(data: bytes) -> None:
    """What a worker, perhaps taken over, says to the SP."""
    _round_trip(worker.parse_from_worker, worker.encode, data)


def fuzz_security_block(data: bytes) -> None:
    """A VM's stored block: this VM's and at rest, or an error."""
    try:
        block = VmSecurityBlock.from_record(_VM, data)
    except IntegrityError:
        return
    at_rest = block.state in (VmState.STOPPED, VmState.HIBERNATED)
    assert block.vm_id == _VM and at_rest and block.boot_id is None, "a loaded block is at rest"
    assert 0 <= block.boots < 1 << 63 and 0 <= block.version < 1 << 63, "numbers are within their bounds"
    assert len(block.ownership.vm_key) == len(block.ownership.user_secret) == 32, "secrets have their length"
    assert VmSecurityBlock.from_record(_VM, block.to_record()) == block, "a block survives its record"


def fuzz_mailbox(data: bytes) -> None:
    """A frame in VM memory: opened if it is the sealed one at its address, refused after any change."""
    program = Program(data)
    direction = program.choose(tuple(Direction))
    session = mailbox.derive_session(_KEY, program.take(32).ljust(32, b"\0"), b"v" * 32)
    sequence = program.choose((1, 2, mailbox.MAX_SEQUENCE, 1 + program.below(mailbox.MAX_SEQUENCE)))
    address = program.choose((0x2000, 0x4000, program.number(8)))
    payload = program.take(1 + program.below(64)).ljust(1 + program.choose((0, 9, 100, 4095)), b"\0")
    frame = session.seal(direction, sequence, address, payload)
    header = mailbox.parse_header(frame, direction)
    assert header == (len(payload), sequence, address, session.vm_nonce), "a header reads as it was written"
    assert session.open(direction, header, address, frame) == payload, "what was sealed opens"
    _refused_unless_same(program, session, (direction, address, frame, payload))
    _opened(mailbox.derive_session(_KEY, b"s" * 32, b"v" * 32), direction, address, program.rest(), must_fail=True)


def _refused_unless_same(
    program: Program, session: mailbox.Session, sealed: tuple[Direction, int, bytes, bytes]
) -> None:
    direction, address, frame, payload = sealed
    other = mailbox.derive_session(_OTHER_KEY, b"s" * 32, session.vm_nonce)
    changed = program.damage(frame)
    place = program.choose((address, address, address, address ^ 1 << program.below(64)))
    opener = program.choose((session, session, session, other))
    same = changed.startswith(frame) and place == address and opener is session
    opened = _opened(opener, direction, place, changed, must_fail=not same)
    assert not same or opened == payload, "an unchanged frame opens"
    _opened(session, Direction(3 - direction), address, frame, must_fail=True)


def _opened(
    session: mailbox.Session, direction: Direction, address: int, frame: bytes, *, must_fail: bool
) -> bytes | None:
    try:
        header = mailbox.parse_header(frame, direction)
        payload = session.open(direction, header, address, frame)
    except MailboxError:
        return None
    assert not must_fail, "a frame that was altered, moved, turned round or made with another key is refused"
    return payload


def _records() -> Sequence[bytes]:
    ownership = Ownership(
        owner=_KEY, user_secret=_OTHER_KEY, vm_key=_KEY, policy=ANYTHING, label="mail", inject_key=True
    )
    block = VmSecurityBlock.provision(_VM, ownership)
    other = VmSecurityBlock.provision(uuid.UUID(int=1), ownership)
    imported = VmSecurityBlock.provision_imported(_VM, ownership, uuid.UUID(int=2), 7, hibernated=True)
    return [each.to_record() for each in (block, imported, block.launch().bind(uuid.UUID(int=2)), other)]


def _encoded(encode: Callable[[T], bytes], all_of: Sequence[T]) -> Callable[[], Sequence[bytes]]:
    return lambda: [encode(message) for message in all_of]


def _message_target(
    name: str, about: str, run: Callable[[bytes], None], seeds: Callable[[], Sequence[bytes]]
) -> Target:
    return Target(name, about, run, seeds, _WORDS, examples=800, longest=2048)


MESSAGE_TARGETS = (
    _message_target("requests", "hypervisor to SP", fuzz_requests, _encoded(messages.encode_message, _REQUESTS)),
    _message_target("replies", "SP to hypervisor", fuzz_replies, _encoded(messages.encode_message, _REPLIES)),
    _message_target("to_worker", "SP to worker", fuzz_to_worker, _encoded(worker.encode, _TO_WORKER)),
    _message_target("from_worker", "worker to SP", fuzz_from_worker, _encoded(worker.encode, _FROM_WORKER)),
    _message_target("security_block", "a VM security block as stored", fuzz_security_block, _records),
    Target("mailbox", "frames in VM memory: header, tag, address", fuzz_mailbox),
)
