"""The memory of a VM that moves while it runs, as those carry it who have no key: sealed records, a page each, and a last one.

    record   version u8 = 1, kind u8, index u32, n u32, nonce 12 bytes, content of n bytes as ciphertext, tag 16 bytes
    stream   "SPVTPMST", version u16 = 1, records; the final one is the last

All little-endian. A page may come again: the newest record of an index counts. What is in a record, `memory_stream.py` knows.

Format: docs/formats/memory-stream.md.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from spvtpm.wire.agent_api import MAX_IMAGE_BYTES
from spvtpm.wire.platform_errors import MemoryStreamDamaged

HANDOFF_BYTES: Final = 16
STOP_NONCE_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
"""Source: NIST SP 800-38D, sections 5.2.1.1 and 5.2.1.2."""

PAGE_BYTES: Final = 32 << 10
"""Of memory in each page but the last one; a record fits into a frame of 64 KiB."""

MAX_MEMORY_BYTES: Final = MAX_IMAGE_BYTES - PAGE_BYTES
"""So that a stream, with what is around each page, is never longer than a memory image may be."""

MAX_PAGES: Final = -(-MAX_MEMORY_BYTES // PAGE_BYTES)

RECORD_HEADER: Final = struct.Struct(f"<BBII{NONCE_BYTES}s")
FINAL: Final = struct.Struct("<IQ32s")
"""What the final record holds: number of pages, bytes of memory, digest of the pages' tags."""

MAX_RECORD_BYTES: Final = RECORD_HEADER.size + PAGE_BYTES + TAG_BYTES
MAX_ROUND_BYTES: Final = MAX_PAGES * MAX_RECORD_BYTES + RECORD_HEADER.size + FINAL.size + TAG_BYTES
"""All pages and a final record."""

VERSION: Final = 1
STREAM_MAGIC: Final = b"SPVTPMST"
_STREAM_HEADER: Final = struct.Struct("<8sH")


class Kind(IntEnum):
    """What a record is."""

    PAGE = 1
    FINAL = 2


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose layout is right; whether it is authentic, nobody knows yet.

    Attributes:
        kind: page or final.
        index: of the page; 0 in a final one.
        data: all of it, with its header.
    """

    kind: Kind
    index: int
    data: bytes

    @property
    def header(self) -> bytes:
        """All before the ciphertext."""
        return self.data[: RECORD_HEADER.size]

    @property
    def nonce(self) -> bytes:
        """12 bytes."""
        return self.data[RECORD_HEADER.size - NONCE_BYTES : RECORD_HEADER.size]

    @property
    def sealed(self) -> bytes:
        """Ciphertext and tag."""
        return self.data[RECORD_HEADER.size :]

    @property
    def tag(self) -> bytes:
        """16 bytes."""
        return self.data[-TAG_BYTES:]

    @property
    def content_bytes(self) -> int:
        """Of the content."""
        return len(self.data) - RECORD_HEADER.size - TAG_BYTES


def parse_record(data: bytes) -> Record:
    """Reads one record; hostile bytes.

    Raises:
        MemoryStreamDamaged: it is none, of another version, or out of bounds.
    """
    if len(data) < RECORD_HEADER.size or len(data) != _length(data, 0):
        raise MemoryStreamDamaged("a record of a memory stream is cut off, or has bytes behind it")
    _version, kind, index, _content_bytes, _nonce = RECORD_HEADER.unpack_from(data)
    return Record(Kind(kind), index, data)


def _length(data: bytes, at: int) -> int:
    """Of the record whose header is there."""
    version, kind, index, content_bytes, _nonce = RECORD_HEADER.unpack_from(data, at)
    if version != VERSION:
        raise MemoryStreamDamaged("a record of a memory stream is of no version known here")
    if kind == Kind.PAGE:
        is_good = index < MAX_PAGES and 1 <= content_bytes <= PAGE_BYTES
    else:
        is_good = kind == Kind.FINAL and index == 0 and content_bytes == FINAL.size
    if not is_good:
        raise MemoryStreamDamaged("a record of a memory stream is of no known kind, or out of bounds")
    return RECORD_HEADER.size + int(content_bytes) + TAG_BYTES


def split_records(data: bytes, at: int = 0) -> Iterator[Record]:
    """The records that stand one behind the other; hostile bytes.

    Args:
        data: no longer than its reader can bear.
        at: where the first one begins.

    Raises:
        MemoryStreamDamaged: one is none, or cut off.
    """
    while at < len(data):
        if len(data) - at < RECORD_HEADER.size:
            raise MemoryStreamDamaged("a memory stream ends inside a record")
        ends = at + _length(data, at)
        yield parse_record(data[at:ends])
        at = ends


class PageLedger:
    """Which record of each page is the newest, by its tag: what a final record has to agree with. Of one stream."""

    def __init__(self) -> None:
        self._pages: dict[int, tuple[int, bytes]] = {}

    def take(self, record: Record) -> None:
        """A page, in the order in which they come.

        Raises:
            MemoryStreamDamaged: it is none.
        """
        if record.kind is not Kind.PAGE:
            raise MemoryStreamDamaged("a final record where a page was expected")
        self._pages[record.index] = record.content_bytes, record.tag

    def digest(self, memory_bytes: int) -> bytes:
        """SHA-256 of the tags of the pages that memory of this length has.

        Args:
            memory_bytes: at most `MAX_MEMORY_BYTES`. Pages beyond are of memory that was longer, and do not count.

        Raises:
            MemoryStreamDamaged: pages are missing, or of another length.
        """
        digest = hashlib.sha256()
        for index in range(page_count(memory_bytes)):
            content_bytes, tag = self._pages.get(index, (0, b""))
            if content_bytes != min(PAGE_BYTES, memory_bytes - index * PAGE_BYTES):
                raise MemoryStreamDamaged("a page of the memory is missing, or has another length")
            digest.update(tag)
        return digest.digest()


def page_count(memory_bytes: int) -> int:
    """Pages that memory of this length has."""
    return -(-memory_bytes // PAGE_BYTES)


class NewestRecords:
    """A stream as it is gathered where it goes to: the newest record of each page, and the final one. Bounded."""

    def __init__(self) -> None:
        self._pages: dict[int, Record] = {}
        self._final: Record | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the final record is there."""
        return self._final is not None

    def take(self, data: bytes) -> None:
        """A record, in the order in which they come.

        Raises:
            MemoryStreamDamaged: it is none, or comes behind the final one.
        """
        record = parse_record(data)
        if self._final is not None:
            raise MemoryStreamDamaged("a record comes behind the final one")
        if record.kind is Kind.FINAL:
            self._final = record
        else:
            self._pages[record.index] = record

    def stream(self) -> bytes:
        """All as one file.

        Raises:
            MemoryStreamDamaged: the final record is missing.
        """
        if self._final is None:
            raise MemoryStreamDamaged("the final record of a memory stream is missing")
        header = _STREAM_HEADER.pack(STREAM_MAGIC, VERSION)
        return b"".join([header, *(self._pages[index].data for index in sorted(self._pages)), self._final.data])


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream as a file.

    Attributes:
        pages: the newest record of each, by its index.
        ledger: of the same.
        final: the last record.
    """

    pages: dict[int, Record]
    ledger: PageLedger
    final: Record


def parse_stream(data: bytes) -> Stream:
    """Reads the file; hostile bytes.

    Raises:
        MemoryStreamDamaged: it is none, of another version, cut off, or too long.
    """
    if not _STREAM_HEADER.size <= len(data) <= MAX_IMAGE_BYTES:
        raise MemoryStreamDamaged("the memory stream is too long or too short")
    magic, version = _STREAM_HEADER.unpack_from(data)
    if magic != STREAM_MAGIC or version != VERSION:
        raise MemoryStreamDamaged("it is no memory stream of a version known here")
    pages, ledger, final = dict[int, Record](), PageLedger(), None
    for record in split_records(data, _STREAM_HEADER.size):
        if final is not None:
            raise MemoryStreamDamaged("a record comes behind the final one")
        if record.kind is Kind.FINAL:
            final = record
        else:
            pages[record.index] = record
            ledger.take(record)
    if final is None:
        raise MemoryStreamDamaged("the final record of a memory stream is missing")
    return Stream(pages, ledger, final)
