"""Targets for what passes between an owner and a secure processor, and for the owner's keyring."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

from cryptography.hazmat.primitives.serialization import Encoding
from tests.owner import ANYTHING, Owner

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.terminal import keyring_file
from spvtpm.terminal.keyring_file import Content
from spvtpm.terminal.whereabouts import AtChip, Exporting, Importing, InFile, Known
from spvtpm.wire import introductions, messages
from spvtpm.wire import owner_messages as owner
from spvtpm.wire.errors import KeyringError, MessageError, WrongPassphrase

T = TypeVar("T")
_ID, _CHIP, _SHA256 = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8"), b"c" * 16, b"s" * 32
_SECRET = b"a secret of thirty-two bytes !!!"
_NEW = owner.NewVtpm(policy=ANYTHING, label="web")
_REQUESTS: Sequence[owner.OwnerRequest] = (
    owner.Provision(vm_id=_ID, user_secret=_SECRET, vm_key=_SECRET, vtpm=_NEW),
    owner.Provision(
        vm_id=_ID, user_secret=_SECRET, vm_key=_SECRET, vtpm=owner.ImportVtpm(size_bytes=9, newest_version=1)
    ),
    owner.Piece(data=b"piece"),
    owner.AcknowledgeExport(vm_id=_ID, version=1, sha256=_SHA256),
    owner.RotateUserSecret(user_secret=_SECRET),
    owner.ListMine(after=_ID),
    owner.AskFate(vtpm_id=_ID),
    *(kind(vm_id=_ID) for kind in (owner.ExportVtpm, owner.DestroyVm, owner.ReadEvents, owner.GetEndorsement)),
)
_MINE = owner.MyVm(
    vm_id=_ID, state="stopped", boots=1, label="web", vtpm_id=_ID, residency="off", version=2, policy=ANYTHING
)
_REPLIES: Sequence[owner.OwnerReply] = (
    owner.ExportBegins(vtpm_id=_ID, version=1, size_bytes=9, hibernated=True),
    owner.Piece(data=b"piece"),
    owner.Fate(vtpm_id=_ID, state="exported", version=1, sha256=_SHA256),
    owner.MyVms(vms=[_MINE], more=True),
    owner.Rotated(vms=1),
    owner.Events(events=[owner.Event(time_s=1, what="launched", detail="boot 1")]),
    owner.Done(),
    messages.ErrorReply("not-found", "there is no such VM"),
)
_CLEAR: Sequence[introductions.ClearMessage] = (
    introductions.Knock(),
    introductions.Papers((b"a", b"b", b"c", b"d")),
    introductions.Introduce(b"certificate"),
    messages.ErrorReply("resource", "no room"),
)
_KINDS = {type(message).__name__ for message in (*_REQUESTS, *_REPLIES, *_CLEAR)} | {"NewVtpm", "ImportVtpm"}
_WORDS = [bytes([0xA0 | len(word)]) + word.encode() for word in sorted(_KINDS)]


def _round_trip(parse: Callable[[bytes], T], encode: Callable[[T], bytes], data: bytes) -> None:
    """What parses is a message, and its own encoding says the same; an error quotes no secret."""
    try:
        message = parse(data)
    except MessageError as error:
        assert _SECRET.decode() not in str(error), "an error quotes a secret"
        return
    assert parse(encode(message)) == message, "what is parsed encodes to the same message"
    assert _SECRET.decode() not in repr(message) or isinstance(message, owner.Piece), "a repr shows a secret"


def fuzz_owner_requests(data: bytes) -> None:
    """An owner's request."""
    _round_trip(owner.parse_owner_request, owner.encode_owner_message, data)


def fuzz_owner_replies(data: bytes) -> None:
    """The secure processor's answer to an owner."""
    _round_trip(owner.parse_owner_reply, owner.encode_owner_message, data)


def fuzz_introductions(data: bytes) -> None:
    """What is said before TLS."""
    _round_trip(introductions.parse_clear, introductions.encode_clear, data)


@cache
def _content() -> Content:
    places = (
        AtChip(_CHIP),
        InFile(1, _SHA256, "/file"),
        Exporting(_CHIP, 1, _SHA256, "/file"),
        Importing(_CHIP, 1, _SHA256, None),
    )
    return Content(
        owner_key=b"key",
        certificate=Owner().certificate.public_bytes(Encoding.DER),
        user_secrets=(_SECRET,),
        vtpms=tuple(Known(_ID, _ID, "web", 1, place) for place in places),
    )


@cache
def _key() -> keyring_file.PassphraseKey:
    return keyring_file.PassphraseKey(14, 8, 1, b"s" * 32, b"k" * 32)


@cache
def _sealed() -> bytes:
    return keyring_file.encode_sealed(_content(), _key())


def fuzz_keyring(data: bytes) -> None:
    """A keyring is read whole, or refused: with damage, with damage and a checksum made anew, or of other bytes."""
    program = Program(data)
    kind = program.below(4)
    if kind == 0:
        _read_clear(program.rest())
        return
    file = program.damage(_sealed()[:-32]) if kind > 1 else program.rest()
    if kind == 3:
        file += hashlib.sha256(file).digest()
    try:
        content = keyring_file.parse_sealed(file, _key())
    except (KeyringError, WrongPassphrase):
        return
    assert content == _content(), "what opens is what was sealed"


def _read_clear(file: bytes) -> None:
    try:
        content = keyring_file.parse_clear(file)
    except KeyringError as error:
        assert _SECRET.decode() not in str(error), "an error quotes a secret"
        return
    assert keyring_file.parse_clear(keyring_file.encode_clear(content)) == content, "a keyring survives its file"


def _clear_seeds() -> Sequence[bytes]:
    return [b"\0" + keyring_file.encode_clear(_content()), b"\2", b"\3"]


OWNER_TARGETS = (
    Target(
        "owner_requests",
        "an owner's request inside the channel",
        fuzz_owner_requests,
        lambda: [owner.encode_owner_message(message) for message in _REQUESTS],
        _WORDS,
    ),
    Target(
        "owner_replies",
        "a secure processor's answer inside the channel",
        fuzz_owner_replies,
        lambda: [owner.encode_owner_message(message) for message in _REPLIES],
        _WORDS,
    ),
    Target(
        "introductions",
        "what both sides say before TLS",
        fuzz_introductions,
        lambda: [introductions.encode_clear(message) for message in _CLEAR],
        _WORDS,
    ),
    Target("keyring", "the owner's keyring, clear and sealed", fuzz_keyring, _clear_seeds),
)
