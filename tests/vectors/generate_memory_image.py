"""Writes the test vectors of memory images, from an implementation of its own.

Written against docs/formats/memory-image.md, with HMAC from the standard library and AES-GCM from `cryptography`: it imports
nothing of `spvtpm`, so an error in the format's text, in the package, or here shows as a difference. Run it from the root of the
repository:

    .venv/bin/python tests/vectors/generate_memory_image.py

All inputs are constants, so that the files come out the same every time. A file is text: comment lines that begin with `#`,
then lines `name: value`. `expect` is `ok`, or the code of the error that a reader must give; what else there is is hexadecimal.
`archive` is what `image` holds.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FOLDER = Path(__file__).parent / "memory_image"
VM_KEY = hashlib.sha256(b"spvtpm memory image vector: VM key").digest()
OTHER_KEY = hashlib.sha256(b"spvtpm memory image vector: another VM key").digest()
VM_ID = hashlib.sha256(b"spvtpm memory image vector: VM id").digest()[:16]
OTHER_ID = hashlib.sha256(b"spvtpm memory image vector: another VM id").digest()[:16]
NONCE = hashlib.sha256(b"spvtpm memory image vector: nonce").digest()[:12]
ARCHIVE = b"any bytes: what is in the archive is not this format's affair"
HEADER_BYTES = 38


def seal(archive: bytes, vm_key: bytes = VM_KEY, vm_id: bytes = VM_ID, version: int = 1) -> bytes:
    """HKDF-SHA-256 with one block of output, as RFC 5869 writes it; then AES-256-GCM over all of it."""
    extracted = hmac.digest(vm_id, vm_key, "sha256")
    key = hmac.digest(extracted, b"spvtpm memory image v1" + b"\x01", "sha256")
    header = b"SPVTPMEM" + version.to_bytes(2, "little") + vm_id + NONCE
    return header + AESGCM(key).encrypt(NONCE, archive, header)


def flipped(image: bytes, at: int) -> bytes:
    """With one bit another."""
    changed = bytearray(image)
    changed[at] ^= 1
    return bytes(changed)


GOOD = {
    "ok-short": ("As a VM writes it.", ARCHIVE),
    "ok-empty": ("Nothing inside.", b""),
}
IMAGE = seal(ARCHIVE)
BAD = {
    "bad-nothing": ("No byte at all.", b""),
    "bad-cut-in-header": ("It ends in the header.", IMAGE[: HEADER_BYTES - 1]),
    "bad-cut-in-tag": ("It ends in the tag.", IMAGE[:-1]),
    "bad-no-tag": ("A header alone.", IMAGE[:HEADER_BYTES]),
    "bad-byte-behind": ("A byte behind the tag.", IMAGE + b"\0"),
    "bad-magic": ("Another beginning.", flipped(IMAGE, 0)),
    "bad-version-altered": ("The version altered.", flipped(IMAGE, 8)),
    "bad-version-2": ("Sealed as version 2.", seal(ARCHIVE, version=2)),
    "bad-vm-id-altered": ("The VM id altered.", flipped(IMAGE, 10)),
    "bad-nonce-altered": ("The nonce altered.", flipped(IMAGE, 26)),
    "bad-ciphertext": ("The ciphertext altered.", flipped(IMAGE, HEADER_BYTES)),
    "bad-tag": ("The tag altered.", flipped(IMAGE, len(IMAGE) - 1)),
    "bad-other-vm": ("Another VM's, under its key.", seal(ARCHIVE, OTHER_KEY, OTHER_ID)),
    "bad-other-key": ("Under another VM key.", seal(ARCHIVE, OTHER_KEY)),
    "bad-other-vm-renamed": (
        "Another VM's, sealed under this VM's key, with this VM's id written into it afterwards.",
        IMAGE[:10] + VM_ID + seal(ARCHIVE, VM_KEY, OTHER_ID)[26:],
    ),
}


def vectors() -> dict[str, str]:
    """The content of each file by its name."""
    found = {}
    for name, (comment, archive) in GOOD.items():
        lines = [f"# {comment}", "expect: ok", f"nonce: {NONCE.hex()}", f"archive: {archive.hex()}"]
        found[name] = [*lines, f"image: {seal(archive).hex()}"]
    for name, (comment, image) in BAD.items():
        found[name] = [f"# {comment}", "expect: memory-image", f"image: {image.hex()}"]
    keys = [f"vm-id: {VM_ID.hex()}", f"vm-key: {VM_KEY.hex()}"]
    return {name: "\n".join([*lines[:2], *keys, *lines[2:]]) + "\n" for name, lines in found.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in vectors().items():
        (FOLDER / f"{name}.txt").write_text(text)
