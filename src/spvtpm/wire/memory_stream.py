"""The memory of a VM that moves while it runs, for those who have the VM key: pages sealed, the final record, all of it opened.

    page key  = HKDF-SHA-256(VM key, salt = handoff id,               info = "spvtpm memory pages v1", 32 bytes)
    final key = HKDF-SHA-256(VM key, salt = handoff id || stop nonce, info = "spvtpm memory final v1", 32 bytes)

The secure processor makes the stop nonce once the vTPM has been stopped. So no final record is older than that; and the final
record tells the newest record of every page, so older pages, or those of another handoff, do not go with it.

Nonces are random: whoever commands a machine may name a handoff twice, and a counter would begin again.

Source: AES-GCM: NIST SP 800-38D; HKDF: RFC 5869. Format: docs/formats/memory-stream.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.wire.memory_records import (
    FINAL,
    MAX_MEMORY_BYTES,
    NONCE_BYTES,
    PAGE_BYTES,
    RECORD_HEADER,
    VERSION,
    Kind,
    PageLedger,
    Record,
    page_count,
    parse_record,
    parse_stream,
)
from spvtpm.wire.platform_errors import MemoryStreamDamaged

_PAGES: Final = b"spvtpm memory pages v1"
_FINAL: Final = b"spvtpm memory final v1"


class PageSealer:
    """Seals pages of one handoff.

    Args:
        vm_key: 32 bytes.
        handoff_id: 16 bytes.
    """

    def __init__(self, vm_key: bytes, handoff_id: bytes) -> None:
        self._cipher = _page_cipher(vm_key, handoff_id)
        self._handoff_id = handoff_id

    def seal(self, index: int, page: bytes) -> bytes:
        """The record of a page of at most `PAGE_BYTES`."""
        return _seal(self._cipher, self._handoff_id, Kind.PAGE, index, page)


def cut_pages(memory: bytes) -> Iterator[bytes]:
    """The memory as pages; all but the last one of the same length."""
    return (memory[at : at + PAGE_BYTES] for at in range(0, len(memory), PAGE_BYTES))


def seal_final(vm_key: bytes, handoff_id: bytes, stop_nonce: bytes, ledger: PageLedger, memory_bytes: int) -> bytes:
    """The final record.

    Args:
        vm_key: 32 bytes.
        handoff_id: 16 bytes.
        stop_nonce: 32 bytes.
        ledger: of all records of this handoff.
        memory_bytes: length of the memory.

    Raises:
        MemoryStreamDamaged: the ledger lacks pages of it.
    """
    content = FINAL.pack(page_count(memory_bytes), memory_bytes, ledger.digest(memory_bytes))
    return _seal(_final_cipher(vm_key, handoff_id, stop_nonce), handoff_id, Kind.FINAL, 0, content)


def verify_final(vm_key: bytes, handoff_id: bytes, stop_nonce: bytes, ledger: PageLedger, data: bytes) -> None:
    """Whether the records that the ledger has seen are the memory of a VM that was halted after its vTPM.

    Args:
        vm_key: 32 bytes.
        handoff_id: 16 bytes.
        stop_nonce: 32 bytes.
        ledger: of the pages.
        data: the final record; hostile bytes.

    Raises:
        MemoryStreamDamaged: they are not; or it is no such record, or one of another VM, handoff or stop.
    """
    _check_final(vm_key, handoff_id, stop_nonce, ledger, parse_record(data))


def open_stream(vm_key: bytes, handoff_id: bytes, stop_nonce: bytes, data: bytes) -> bytes:
    """The memory that a stream holds; hostile bytes.

    Args:
        vm_key: 32 bytes.
        handoff_id: in which it has come, 16 bytes.
        stop_nonce: of that handoff, 32 bytes.
        data: the stream as a file.

    Raises:
        MemoryStreamDamaged: it is no stream of this VM and handoff, or was altered; or some of its pages are not the newest.
    """
    stream = parse_stream(data)
    memory_bytes = _check_final(vm_key, handoff_id, stop_nonce, stream.ledger, stream.final)
    cipher = _page_cipher(vm_key, handoff_id)
    pages = (stream.pages[index] for index in range(page_count(memory_bytes)))
    return b"".join(_open(cipher, handoff_id, page) for page in pages)


def _check_final(vm_key: bytes, handoff_id: bytes, stop_nonce: bytes, ledger: PageLedger, record: Record) -> int:
    """Returns the length of the memory."""
    if record.kind is not Kind.FINAL:
        raise MemoryStreamDamaged("a page where the final record was expected")
    content = _open(_final_cipher(vm_key, handoff_id, stop_nonce), handoff_id, record)
    pages, memory_bytes, digest = FINAL.unpack(content)
    if memory_bytes > MAX_MEMORY_BYTES or pages != page_count(memory_bytes):
        raise MemoryStreamDamaged("the final record of a memory stream is out of bounds")
    if ledger.digest(memory_bytes) != digest:
        raise MemoryStreamDamaged("pages of the memory are not the newest, or were altered")
    return int(memory_bytes)


def _seal(cipher: AESGCM, handoff_id: bytes, kind: Kind, index: int, content: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    header = RECORD_HEADER.pack(VERSION, kind, index, len(content), nonce)
    return header + cipher.encrypt(nonce, content, handoff_id + header)


def _open(cipher: AESGCM, handoff_id: bytes, record: Record) -> bytes:
    try:
        return cipher.decrypt(record.nonce, record.sealed, handoff_id + record.header)
    except InvalidTag:
        raise MemoryStreamDamaged(
            "a record of a memory stream was altered, or is of another handoff, another stop, or another VM"
        ) from None


def _page_cipher(vm_key: bytes, handoff_id: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, handoff_id, _PAGES).derive(vm_key))


def _final_cipher(vm_key: bytes, handoff_id: bytes, stop_nonce: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, handoff_id + stop_nonce, _FINAL).derive(vm_key))
