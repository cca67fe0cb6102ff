"""A memory in rounds: what comes out is what was there last; nothing older, altered, reordered or of elsewhere does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire.agent_api import MAX_IMAGE_BYTES
from spvtpm.wire.memory_records import (
    MAX_MEMORY_BYTES,
    MAX_PAGES,
    PAGE_BYTES,
    RECORD_HEADER,
    NewestRecords,
    PageLedger,
    parse_record,
    parse_stream,
    split_records,
)
from spvtpm.wire.memory_stream import PageSealer, cut_pages, open_stream, seal_final, verify_final
from spvtpm.wire.platform_errors import ImageDamaged, MemoryStreamDamaged
from tests.vectors import generate_memory_stream

FOLDER = Path(generate_memory_stream.__file__).parent / "memory_stream"
FILES = sorted(FOLDER.glob("*.txt"))
KEY, HANDOFF, STOP = b"k" * 32, b"h" * 16, b"s" * 32


class Source:
    """A VM whose memory goes away in rounds.

    Args:
        handoff: its id.
    """

    def __init__(self, handoff: bytes = HANDOFF, vm_key: bytes = KEY) -> None:
        self.handoff, self.vm_key = handoff, vm_key
        self.ledger = PageLedger()
        self._sealer = PageSealer(vm_key, handoff)

    def round(self, memory: bytes, but: Sequence[int] = ()) -> list[bytes]:
        """Records of all pages but some."""
        pages = [(index, page) for index, page in enumerate(cut_pages(memory)) if index not in but]
        records = [self._sealer.seal(index, page) for index, page in pages]
        for record in records:
            self.ledger.take(parse_record(record))
        return records

    def final(self, memory: bytes, stop: bytes = STOP) -> bytes:
        return seal_final(self.vm_key, self.handoff, stop, self.ledger, len(memory))


def stream(records: Sequence[bytes]) -> bytes:
    """As a destination gathers it."""
    gathered = NewestRecords()
    for record in records:
        gathered.take(record)
    return gathered.stream()


def ledger_of(records: Sequence[bytes]) -> PageLedger:
    """As a secure processor that hands records on keeps it."""
    ledger = PageLedger()
    for record in records:
        ledger.take(parse_record(record))
    return ledger


def memory_of(pages: int, seed: int, tail: int = 5) -> bytes:
    """Memory of so many pages, the last of which is short."""
    return b"".join(bytes([seed, index]) * (PAGE_BYTES // 2) for index in range(pages - 1)) + bytes([seed]) * tail


MEMORIES = st.builds(memory_of, st.integers(1, 5), st.integers(0, 255), st.sampled_from([1, 5, PAGE_BYTES]))


def refused(records: Sequence[bytes], handoff: bytes = HANDOFF, stop: bytes = STOP) -> None:
    """By whoever restores it, and, where its records can be parsed, by a secure processor on the way."""
    with pytest.raises(MemoryStreamDamaged):
        open_stream(KEY, handoff, stop, stream(records))
    with pytest.raises(MemoryStreamDamaged):
        verify_final(KEY, handoff, stop, ledger_of(records[:-1]), records[-1])


def _read(file: Path) -> dict[str, str]:
    lines = (line.partition(": ") for line in file.read_text().splitlines() if not line.startswith("#"))
    return {name.removesuffix(":"): value for name, _, value in lines}


@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("ok-")], ids=lambda file: file.stem)
def test_a_good_vector_opens_and_is_written_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = {name: bytes.fromhex(value) for name, value in _read(file).items() if name != "expect"}
    memory, data, handoff, stop = (vector[name] for name in ("memory", "stream", "handoff-id", "stop-nonce"))
    assert open_stream(vector["vm-key"], handoff, stop, data) == memory

    nonces = {record.nonce: record for record in split_records(data, 10)}
    assert b"".join(nonces) == vector["nonces"]
    newest = [*parse_stream(data).pages.values(), parse_stream(data).final]
    left = [record.nonce for record in newest if record.index * PAGE_BYTES < max(1, len(memory))]
    monkeypatch.setattr(os, "urandom", lambda _size: left.pop(0))
    source = Source(handoff, vector["vm-key"])
    pages = newest[:-1]
    order = [page.index for page in pages if page.index * PAGE_BYTES < len(memory)]
    made = [source.round(memory, [at for at in range(MAX_PAGES) if at != index])[0] for index in order]
    assert made == [page.data for page in pages if page.index in order]
    assert source.final(memory, stop) == newest[-1].data


@pytest.mark.attack("A18")
@pytest.mark.attack("A25")
@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("bad-")], ids=lambda file: file.stem)
def test_a_bad_vector_is_refused(file: Path) -> None:
    vector = _read(file)
    with pytest.raises(MemoryStreamDamaged) as error:
        open_stream(*(bytes.fromhex(vector[name]) for name in ("vm-key", "handoff-id", "stop-nonce", "stream")))
    assert error.value.code == vector["expect"]
    assert isinstance(error.value, ImageDamaged)


def test_the_files_are_what_the_independent_implementation_writes() -> None:
    assert {file.stem: file.read_text() for file in FILES} == generate_memory_stream.vectors()


@given(st.lists(MEMORIES, min_size=1, max_size=4), st.data())
def test_any_mix_of_rounds_restores_what_was_there_last(memories: list[bytes], data: st.DataObject) -> None:
    source, records, last = Source(), list[bytes](), dict[int, bytes]()
    for memory in memories:
        pages = dict(enumerate(cut_pages(memory)))
        same = [index for index, page in pages.items() if last.get(index) == page]
        records += source.round(memory, list(data.draw(st.sets(st.sampled_from(same)))) if same else ())
        last |= pages
    final = source.final(memories[-1])
    verify_final(KEY, HANDOFF, STOP, ledger_of(records), final)
    assert open_stream(KEY, HANDOFF, STOP, stream([*records, final])) == memories[-1]


@given(st.integers(2, 4), st.data())
@pytest.mark.attack("A18")
def test_an_older_page_of_the_same_stream_is_refused(pages: int, data: st.DataObject) -> None:
    source = Source()
    older = source.round(memory_of(pages, 1))
    newer = source.round(memory_of(pages, 2))
    final = source.final(memory_of(pages, 2))
    assert open_stream(KEY, HANDOFF, STOP, stream([*older, *newer, final])) == memory_of(pages, 2)
    at = data.draw(st.sets(st.integers(0, pages - 1), min_size=1))
    kept = [older[index] if index in at else newer[index] for index in range(pages)]
    refused([*kept, final])
    refused([*newer, *(older[index] for index in at), final])


@given(st.data())
@pytest.mark.attack("A18")
def test_pages_in_another_order_of_rounds_lost_or_of_elsewhere_are_refused(data: st.DataObject) -> None:
    memory = memory_of(3, 1)
    source = Source()
    records = source.round(memory)
    final = source.final(memory)
    at = data.draw(st.integers(0, 2))
    elsewhere = [Source(b"x" * 16), Source(vm_key=b"y" * 32), Source()]  # the last one: the same page, sealed again
    for stranger in elsewhere:
        refused([*records[:at], *stranger.round(memory)[at : at + 1], *records[at + 1 :], final])
    refused([*records[:at], *records[at + 1 :], final])
    shuffled = data.draw(st.permutations(records))
    assert (
        open_stream(KEY, HANDOFF, STOP, stream([*shuffled, final])) == memory
    )  # whatever order pages of one round come in


@pytest.mark.attack("A18")
def test_two_pages_cannot_change_places() -> None:
    memory = memory_of(3, 1)
    source = Source()
    first, second, third = source.round(memory)
    swapped = [first[:2] + second[2:6] + first[6:], second[:2] + first[2:6] + second[6:]]
    assert sorted(parse_record(record).index for record in swapped) == [0, 1]
    refused([*swapped, third, source.final(memory)])


@given(st.binary(min_size=32, max_size=32).filter(lambda nonce: nonce != STOP))
@pytest.mark.attack("A18")
def test_a_final_record_from_before_the_stop_is_refused(early: bytes) -> None:
    """Whoever halts a VM and lets it run on has a final record of memory that was; not under the nonce of the stop."""
    memory = memory_of(2, 1)
    source = Source()
    records = source.round(memory)
    verify_final(KEY, HANDOFF, early, ledger_of(records), source.final(memory, early))
    refused([*records, source.final(memory, early)])


@pytest.mark.attack("A18")
def test_a_whole_stream_of_an_earlier_handoff_is_refused() -> None:
    memory = memory_of(2, 1)
    earlier = Source(b"e" * 16)
    records = [*earlier.round(memory), earlier.final(memory)]
    assert open_stream(KEY, b"e" * 16, STOP, stream(records)) == memory
    refused(records)


@given(st.data())
@pytest.mark.attack("A18")
def test_an_altered_or_truncated_stream_is_refused(data: st.DataObject) -> None:
    memory = memory_of(2, 1)
    source = Source()
    good = stream([*source.round(memory), source.final(memory)])
    at = data.draw(st.integers(0, len(good) - 1))
    altered = bytearray(good)
    altered[at] ^= 1 << data.draw(st.integers(0, 7))
    for damaged in (bytes(altered), good[:at], good + good[at:]):
        with pytest.raises(MemoryStreamDamaged):
            open_stream(KEY, HANDOFF, STOP, damaged)


def test_a_page_is_never_sealed_twice_under_one_nonce() -> None:
    """Whoever commands machines may name a handoff to two of them: to one that has begun anew, say."""
    memory = memory_of(4, 1)
    records = [record for _ in range(50) for record in Source().round(memory)]
    assert len({parse_record(record).nonce for record in records}) == len(records)


def test_the_longest_memory_is_a_stream_that_can_be_kept_as_an_image() -> None:
    memory = bytes(MAX_MEMORY_BYTES)
    source = Source()
    data = stream([*source.round(memory), source.final(memory)])
    assert len(data) <= MAX_IMAGE_BYTES
    assert open_stream(KEY, HANDOFF, STOP, data) == memory


def test_a_record_fits_into_a_frame_of_a_relay() -> None:
    assert len(Source().round(bytes(PAGE_BYTES))[0]) < 1 << 16


def test_nothing_comes_behind_a_final_record_and_no_stream_is_without_one() -> None:
    source = Source()
    (page,) = source.round(b"memory")
    gathered = NewestRecords()
    gathered.take(page)
    with pytest.raises(MemoryStreamDamaged, match="missing"):
        gathered.stream()
    assert not gathered.is_whole
    gathered.take(source.final(b"memory"))
    assert gathered.is_whole
    for record in (page, source.final(b"memory")):
        with pytest.raises(MemoryStreamDamaged, match="behind"):
            gathered.take(record)


@pytest.mark.attack("A25")
@given(st.binary(max_size=200))
def test_what_is_no_record_is_refused(data: bytes) -> None:
    for parse in (parse_record, parse_stream, lambda data: list(split_records(data)) or parse_record(data)):
        with pytest.raises(MemoryStreamDamaged):
            parse(data)
    size = min(len(data), RECORD_HEADER.size)
    with pytest.raises(MemoryStreamDamaged):
        list(split_records(b"\1\1" + data[:size]))
