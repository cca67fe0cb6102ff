"""The instance file: what goes in comes out under both secrets, in any pieces; nothing else, and nothing early."""

from __future__ import annotations

import base64
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from spvtpm.wire import instance_content
from spvtpm.wire.errors import (
    InstanceDamaged,
    InstanceFileError,
    InstanceOverlong,
    InstanceTruncated,
    NotFound,
    SpvtpmError,
    WrongInstanceKeys,
)
from spvtpm.wire.instance_content import encode_content
from spvtpm.wire.instance_file import (
    HEADER_BYTES,
    MAX_FILE_BYTES,
    Instance,
    InstanceHeader,
    InstanceReader,
    InstanceSecrets,
    InstanceWriter,
    Policy,
    UserSecret,
    open_instance,
    parse_instance_header,
    seal_instance,
)
from tests.vectors.instance_format import File
from tests.wire.instances import OPEN_POLICY, SECRETS, SP, USER, headers, instance, instances, secrets

MARKER, OTHER_MARKER = b"permanent-state-0123456789abcdef", b"volatile-state-fedcba9876543210!"
MIB = 1 << 20


def _reader() -> InstanceReader:
    return InstanceReader(lambda _header: SECRETS)


@pytest.mark.claim("C6a")
@pytest.mark.claim("C6b")
@given(instances(), secrets, st.data())
def test_an_instance_comes_back_however_its_file_is_cut(
    exported: Instance, both: InstanceSecrets, data: st.DataObject
) -> None:
    writer = InstanceWriter(exported, both)
    sizes = data.draw(st.lists(st.integers(1, 100_000), min_size=1, max_size=6))
    file = b""
    while piece := writer.read(sizes[len(file) % len(sizes)]):
        file += piece
    assert len(file) == writer.size_bytes <= MAX_FILE_BYTES
    assert parse_instance_header(file) == exported.header
    assert open_instance(file, both) == exported

    reader, seen = InstanceReader(lambda _header: both), []
    cuts = sorted({0, len(file), *data.draw(st.lists(st.integers(0, len(file)), max_size=8))})
    for start, end in pairwise(cuts):
        header = reader.feed(file[start:end])
        assert (header is not None) == (start < HEADER_BYTES <= end), "the header is told when it is whole, and once"
        seen.append(header)
    assert reader.finish() == exported
    assert [header for header in seen if header is not None] == [exported.header]


@pytest.mark.attack("A06")
@given(instances(), st.data())
def test_any_flipped_bit_is_refused_before_any_state_is_made(exported: Instance, data: st.DataObject) -> None:
    file = bytearray(seal_instance(exported, SECRETS))
    place = data.draw(st.one_of(st.integers(0, len(file) - 1), st.integers(0, HEADER_BYTES + 200)))
    file[place % len(file)] ^= 1 << data.draw(st.integers(0, 7))
    assert _refused_without_a_look_at_the_content(bytes(file))


def _refused_without_a_look_at_the_content(file: bytes) -> SpvtpmError:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("spvtpm.wire.instance_file.decode_content", lambda *_: pytest.fail("content was looked at"))
        with pytest.raises(SpvtpmError) as refused:
            open_instance(file, SECRETS)
    assert type(refused.value) is not SpvtpmError
    return refused.value


@pytest.mark.attack("A06")
def test_every_single_bit_of_a_file_counts() -> None:
    file = seal_instance(instance(MARKER, OTHER_MARKER), SECRETS)
    kinds = set()
    for place in range(len(file)):
        for bit in range(8):
            altered = file[:place] + bytes([file[place] ^ 1 << bit]) + file[place + 1 :]
            with pytest.raises(SpvtpmError) as refused:
                open_instance(altered, SECRETS)
            kinds.add(type(refused.value).__name__)
            if place >= HEADER_BYTES:
                assert type(refused.value) is InstanceDamaged
    expected = {"InstanceFileError", "InstanceFormatUnknown", "WrongInstanceKeys", "InstanceDamaged"}
    assert kinds - {"InstanceTruncated", "InstanceOverlong"} == expected


@pytest.mark.attack("A06")
def test_a_file_cut_anywhere_is_truncated_and_one_with_more_behind_it_overlong() -> None:
    file = seal_instance(instance(MARKER), SECRETS)
    for kept in range(len(file)):
        with pytest.raises(InstanceTruncated):
            open_instance(file[:kept], SECRETS)
    for behind in (b"\0", file[-16:], file):
        reader = _reader()
        reader.feed(file)
        with pytest.raises(InstanceOverlong):
            reader.feed(behind)


@pytest.mark.claim("C4")
@pytest.mark.attack("A07")
@given(instances(), secrets, secrets)
def test_neither_secret_is_enough(exported: Instance, right: InstanceSecrets, wrong: InstanceSecrets) -> None:
    file = seal_instance(exported, right)
    for opener in (
        InstanceSecrets(right.user, wrong.sp),
        InstanceSecrets(wrong.user, right.sp),
        InstanceSecrets(UserSecret(right.sp), right.user.value),
    ):
        if (opener.user.value, opener.sp) == (right.user.value, right.sp):
            continue
        with pytest.raises(WrongInstanceKeys):
            open_instance(file, opener)


@given(instances())
def test_no_two_files_share_their_keys(exported: Instance) -> None:
    one, two = seal_instance(exported, SECRETS), seal_instance(exported, SECRETS)
    assert one[:88] == two[:88], "up to the salt they say the same"
    assert one[88:120] != two[88:120] and one[120:152] != two[120:152]
    assert one[HEADER_BYTES:] != two[HEADER_BYTES:]


def test_the_header_is_shown_to_choose_secrets_by_and_believed_after_its_tag() -> None:
    file = bytearray(seal_instance(instance(MARKER), SECRETS))
    file[71] = 9  # the version
    shown: list[InstanceHeader] = []

    def choose(header: InstanceHeader) -> InstanceSecrets:
        shown.append(header)
        return SECRETS

    with pytest.raises(InstanceDamaged):
        InstanceReader(choose).feed(bytes(file[:HEADER_BYTES]))
    assert [header.version for header in shown] == [9]


def _refuse(_header: InstanceHeader) -> InstanceSecrets:
    raise NotFound("no such generation")


def test_what_the_chooser_of_secrets_raises_comes_through_and_ends_the_reader() -> None:
    file = seal_instance(instance(MARKER), SECRETS)
    reader = InstanceReader(_refuse)
    with pytest.raises(NotFound):
        reader.feed(file)
    for again in (lambda: reader.feed(file), reader.finish):
        with pytest.raises(InstanceFileError, match="already"):
            again()


def test_a_reader_that_has_refused_gives_out_nothing_ever_and_holds_nothing() -> None:
    file = seal_instance(instance(MARKER * 4096), SECRETS)
    reader = _reader()
    reader.feed(file[:70_000])
    assert MARKER in reader._content
    with pytest.raises(InstanceDamaged):
        reader.feed(bytes(70_000))
    assert not reader._content and reader._sealed is None
    for again in (lambda: reader.feed(file[70_000:]), reader.finish):
        with pytest.raises(InstanceFileError, match="already"):
            again()


def test_a_reader_gives_out_its_instance_once() -> None:
    reader = _reader()
    reader.feed(seal_instance(instance(MARKER), SECRETS))
    assert reader.finish() == instance(MARKER)
    assert not reader._content
    with pytest.raises(InstanceFileError, match="already"):
        reader.finish()


@pytest.mark.attack("A06")
def test_a_file_that_is_too_long_takes_no_memory() -> None:
    announced = File(user_secret=USER.value, sp_secret=SP, announced=0xFFFF_FFFF).sealed()
    whole, flood = seal_instance(instance(MARKER), SECRETS), bytes(64 * MIB)
    tracemalloc.start()
    try:
        with pytest.raises(InstanceFileError, match="size of the content"):
            _reader().feed(announced[:HEADER_BYTES])
        for begun in (b"", whole[:HEADER_BYTES], whole):
            reader = _reader()
            reader.feed(begun)
            with pytest.raises(InstanceFileError):
                reader.feed(flood)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def _with_policy(**changed: object) -> Instance:
    return replace(instance(b"p"), policy=msgspec.structs.replace(OPEN_POLICY, **changed))


@pytest.mark.parametrize(
    "unfit",
    [
        instance(b""),
        instance(bytes((1 << 18) + 1)),
        instance(b"p", b""),
        instance(b"p", bytes((1 << 16) + 1)),
        replace(instance(b"p"), volatile=b"v"),
        replace(instance(b"p", b"v"), volatile=None),
        instance(b"p", label="x" * 257),
        instance(b"p", label="\x1b[31m"),
        instance(b"p", label="\ud800"),
        _with_policy(chips=frozenset()),
        _with_policy(chips=frozenset({b"short"})),
        _with_policy(chips=frozenset(bytes([0] * 14 + [n >> 8, n & 255]) for n in range(257))),
        _with_policy(minimum_firmware=-1),
        _with_policy(minimum_firmware=1 << 32),
        _with_policy(minimum_firmware=1 << 64),
        _with_policy(pcr_banks=frozenset({"SHA256"})),
        _with_policy(pcr_banks=frozenset(str(n) for n in range(17))),
    ],
    ids=range(17),
)
def test_what_a_reader_must_refuse_is_never_written(unfit: Instance) -> None:
    with pytest.raises(InstanceFileError):
        seal_instance(unfit, SECRETS)


@given(headers, st.data())
def test_a_header_out_of_its_bounds_cannot_be_made(header: InstanceHeader, data: st.DataObject) -> None:
    bounds = {"version": (1, (1 << 63) - 1), "generation": (1, (1 << 32) - 1), "created_s": (0, 253_402_300_799)}
    name = data.draw(st.sampled_from(sorted(bounds)))
    low, high = bounds[name]
    wrong = data.draw(st.integers(max_value=low - 1) | st.integers(min_value=high + 1))
    with pytest.raises(InstanceFileError):
        replace(header, **{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(InstanceFileError):
        replace(header, fleet_id=data.draw(st.binary().filter(lambda fleet: len(fleet) != 16)))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_size_is_none(size: int) -> None:
    for make in (UserSecret, lambda value: InstanceSecrets(USER, value)):
        with pytest.raises(ValueError, match=f"a secret of {size} bytes"):
            make(bytes(size))


@given(st.binary(max_size=600))
@example(b"")
@example(b"SPVTPMIF\0\1")
def test_any_bytes_are_refused_with_a_typed_error(junk: bytes) -> None:
    for attempt in (lambda: open_instance(junk, SECRETS), lambda: parse_instance_header(junk)):
        with pytest.raises(InstanceFileError):
            attempt()


def _forms_of(secret: bytes) -> list[str]:
    return [secret.decode(), secret.hex(), base64.b64encode(secret).decode()[:40], str(list(secret))[1:-1]]


@pytest.mark.attack("A24")
def test_no_secret_and_no_state_shows_in_a_repr() -> None:
    exported = instance(MARKER, OTHER_MARKER)
    writer, reader = InstanceWriter(exported, SECRETS), _reader()
    file = writer.read(MAX_FILE_BYTES)
    reader.feed(file)
    content = instance_content._decoder.decode(encode_content(exported))
    hidden = [USER.value, SP, MARKER, OTHER_MARKER]
    assert all(form in f"{secret.decode()} {_forms_of(secret)}" for secret in hidden for form in _forms_of(secret))
    for value in (USER, SECRETS, exported, writer, reader, *reader._sealed[:2], content):  # type: ignore[index]
        shown = f"{value!r} {value!s} {pretty_repr(value)} {pretty_repr([value])}"
        assert [form for secret in hidden for form in _forms_of(secret) if form in shown] == []


@pytest.mark.attack("A24")
def test_an_error_quotes_nothing_of_the_content() -> None:
    content = msgspec.msgpack.encode({"permanent": b"p", MARKER.decode(): 1})
    file = File(content=content, user_secret=USER.value, sp_secret=SP).sealed()
    with pytest.raises(InstanceFileError) as refused:
        open_instance(file, SECRETS)
    assert MARKER.decode() not in str(refused.value)
    assert refused.value.__cause__ is None and refused.value.__suppress_context__


def test_a_policy_says_everything_in_so_many_words() -> None:
    with pytest.raises(TypeError):
        Policy(migration_allowed=True)  # type: ignore[call-arg]
