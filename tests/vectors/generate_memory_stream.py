"""Writes the test vectors of memory streams, from an implementation of its own.

Written against docs/formats/memory-stream.md, with HMAC and SHA-256 from the standard library and AES-GCM from `cryptography`: it
imports nothing of `spvtpm`, so an error in the format's text, in the package, or here shows as a difference. Run it from the root
of the repository:

    .venv/bin/python tests/vectors/generate_memory_stream.py

All inputs are constants, so that the files come out the same every time. A file is text: comment lines that begin with `#`,
then lines `name: value`. `expect` is `ok`, or the code of the error that a reader must give; what else there is is hexadecimal.
`memory` is what `stream` holds; `nonces` are those of its records, one behind the other.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def _constant(name: str, size: int = 32) -> bytes:
    return hashlib.sha256(f"spvtpm memory stream vector: {name}".encode()).digest()[:size]


FOLDER = Path(__file__).parent / "memory_stream"
VM_KEY, OTHER_KEY = _constant("VM key"), _constant("another VM key")
HANDOFF, OTHER_HANDOFF = _constant("handoff id", 16), _constant("another handoff id", 16)
STOP, OTHER_STOP = _constant("stop nonce"), _constant("another stop nonce")
PAGE_BYTES = 32_768
HEADER_BYTES = 10
RECORD_HEADER_BYTES = 22
SHORT = b"any bytes: what is in the memory is not this format's affair"
OLDER = bytes(len(SHORT))
LONG = bytes(PAGE_BYTES) + SHORT


def hkdf(vm_key: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA-256 with one block of output, as RFC 5869 writes it."""
    return hmac.digest(hmac.digest(salt, vm_key, "sha256"), info + b"\x01", "sha256")


def record(key: bytes, kind: int, index: int, content: bytes, nonce: bytes, handoff: bytes, version: int = 1) -> bytes:
    """One record."""
    numbers = bytes([version, kind]) + index.to_bytes(4, "little") + len(content).to_bytes(4, "little")
    header = numbers + nonce
    return header + AESGCM(key).encrypt(nonce, content, handoff + header)


def page(
    content: bytes, index: int = 0, name: str = "", vm_key: bytes = VM_KEY, handoff: bytes = HANDOFF, version: int = 1
) -> bytes:
    """The record of a page."""
    key = hkdf(vm_key, handoff, b"spvtpm memory pages v1")
    return record(key, 1, index, content, _constant(f"nonce of page {index}{name}", 12), handoff, version)


def final(
    pages: list[bytes],
    size: int,
    vm_key: bytes = VM_KEY,
    handoff: bytes = HANDOFF,
    stop: bytes = STOP,
    count: int | None = None,
    index: int = 0,
) -> bytes:
    """The final record for the newest record of each page, in the order of their indices."""
    digest = hashlib.sha256(b"".join(data[-16:] for data in pages)).digest()
    number = (len(pages) if count is None else count).to_bytes(4, "little")
    key = hkdf(vm_key, handoff + stop, b"spvtpm memory final v1")
    content = number + size.to_bytes(8, "little") + digest
    return record(key, 2, index, content, _constant("nonce of the final record", 12), handoff)


def stream(*records: bytes, version: int = 1) -> bytes:
    """The file."""
    return b"SPVTPMST" + version.to_bytes(2, "little") + b"".join(records)


def flipped(data: bytes, at: int) -> bytes:
    """With one bit another."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


P0, FINAL = page(SHORT), final([page(SHORT)], len(SHORT))
OLD = page(OLDER, name=", older")
L0, L1 = page(LONG[:PAGE_BYTES]), page(LONG[PAGE_BYTES:], 1)
GOOD = {
    "ok-short": ("One page.", SHORT, [P0, FINAL]),
    "ok-empty": ("No memory at all.", b"", [final([], 0)]),
    "ok-two-pages": ("Two pages.", LONG, [L0, L1, final([L0, L1], len(LONG))]),
    "ok-newer-page": ("A page, the same page again, newer.", SHORT, [OLD, P0, FINAL]),
    "ok-page-beyond": ("A page of memory that was longer before.", SHORT, [page(SHORT, 1), P0, FINAL]),
}
WHOLE = stream(P0, FINAL)
AT_FINAL = HEADER_BYTES + len(P0)
BAD = {
    "bad-nothing": ("No byte at all.", b""),
    "bad-cut-in-header": ("It ends in the header.", WHOLE[: HEADER_BYTES - 1]),
    "bad-header-alone": ("It ends behind the header.", WHOLE[:HEADER_BYTES]),
    "bad-cut-in-record-header": ("It ends in a record's header.", WHOLE[: HEADER_BYTES + 10]),
    "bad-cut-before-final": ("The final record is missing.", WHOLE[:AT_FINAL]),
    "bad-cut-in-tag": ("It ends in the last tag.", WHOLE[:-1]),
    "bad-byte-behind": ("A byte behind the final record.", WHOLE + b"\0"),
    "bad-final-doubled": ("The final record twice.", WHOLE + FINAL),
    "bad-page-behind": ("A page behind the final record.", WHOLE + P0),
    "bad-magic": ("Another beginning.", flipped(WHOLE, 0)),
    "bad-version-2": ("A file of version 2.", stream(P0, FINAL, version=2)),
    "bad-record-version-2": ("A page sealed as version 2.", stream(page(SHORT, version=2), FINAL)),
    "bad-kind-altered": ("The kind of a page altered.", flipped(WHOLE, HEADER_BYTES + 1)),
    "bad-index-altered": ("The index of a page altered.", flipped(WHOLE, HEADER_BYTES + 2)),
    "bad-index-too-large": ("A page further than any memory goes.", stream(page(SHORT, 511), P0, FINAL)),
    "bad-length-altered": ("The length of a page altered.", flipped(WHOLE, HEADER_BYTES + 6)),
    "bad-page-empty": ("A page without content.", stream(page(b""), FINAL)),
    "bad-page-too-long": ("A page of one byte more than a page has.", stream(page(bytes(PAGE_BYTES + 1)), FINAL)),
    "bad-nonce-altered": ("The nonce of a page altered.", flipped(WHOLE, HEADER_BYTES + 10)),
    "bad-ciphertext": ("The ciphertext of a page altered.", flipped(WHOLE, HEADER_BYTES + RECORD_HEADER_BYTES)),
    "bad-tag": ("The tag of a page altered.", flipped(WHOLE, AT_FINAL - 1)),
    "bad-final-ciphertext": ("The final record altered.", flipped(WHOLE, AT_FINAL + RECORD_HEADER_BYTES)),
    "bad-final-tag": ("The tag of the final record altered.", flipped(WHOLE, len(WHOLE) - 1)),
    "bad-final-index": ("A final record with an index.", stream(P0, final([P0], len(SHORT), index=1))),
    "bad-older-page": ("A page that is not the newest.", stream(OLD, FINAL)),
    "bad-order": ("The newest page, then an older one.", stream(P0, OLD, FINAL)),
    "bad-page-missing": ("No page.", stream(FINAL)),
    "bad-second-page-missing": (
        "The final record vouches for two pages; the second is missing.",
        stream(P0, final([P0, L1], PAGE_BYTES + 1)),
    ),
    "bad-page-short": (
        "The final record vouches for a page that is shorter than the memory says.",
        stream(P0, final([P0], len(SHORT) + 1)),
    ),
    "bad-count": ("The number of pages is not that of the length.", stream(P0, final([P0], len(SHORT), count=2))),
    "bad-memory-too-long": ("More memory than fits.", stream(P0, final([P0], 16_777_216 - 32_768 + 1, count=512))),
    "bad-other-key": (
        "Under another VM key.",
        stream(page(SHORT, vm_key=OTHER_KEY), final([page(SHORT, vm_key=OTHER_KEY)], len(SHORT), OTHER_KEY)),
    ),
    "bad-other-handoffs-page": ("A page of another handoff.", stream(page(SHORT, handoff=OTHER_HANDOFF), FINAL)),
    "bad-other-handoffs-vouched": (
        "A page of another handoff, for which the final record vouches.",
        stream(page(SHORT, handoff=OTHER_HANDOFF), final([page(SHORT, handoff=OTHER_HANDOFF)], len(SHORT))),
    ),
    "bad-other-handoff": (
        "A whole stream of another handoff.",
        stream(
            page(SHORT, handoff=OTHER_HANDOFF),
            final([page(SHORT, handoff=OTHER_HANDOFF)], len(SHORT), handoff=OTHER_HANDOFF),
        ),
    ),
    "bad-other-stop": (
        "A final record from before the vTPM was stopped: under another stop nonce.",
        stream(P0, final([P0], len(SHORT), stop=OTHER_STOP)),
    ),
    "bad-final-under-page-key": (
        "A final record sealed under the key of pages.",
        stream(P0, record(hkdf(VM_KEY, HANDOFF, b"spvtpm memory pages v1"), 2, 0, bytes(44), bytes(12), HANDOFF)),
    ),
}


def vectors() -> dict[str, str]:
    """The content of each file by its name."""
    found = {}
    for name, (comment, memory, records) in GOOD.items():
        nonces = b"".join(data[10:22] for data in records).hex()
        lines = [f"# {comment}", "expect: ok", f"nonces: {nonces}", f"memory: {memory.hex()}"]
        found[name] = [*lines, f"stream: {stream(*records).hex()}"]
    for name, (comment, data) in BAD.items():
        found[name] = [f"# {comment}", "expect: memory-stream", f"stream: {data.hex()}"]
    keys = [f"vm-key: {VM_KEY.hex()}", f"handoff-id: {HANDOFF.hex()}", f"stop-nonce: {STOP.hex()}"]
    return {name: "\n".join([*lines[:2], *keys, *lines[2:]]) + "\n" for name, lines in found.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in vectors().items():
        (FOLDER / f"{name}.txt").write_text(text)
