"""Writes the test vectors of the ladder of `SpSecret`s, from an implementation of its own.

Written against docs/formats/chip-file.md, with HMAC from the standard library alone: it imports nothing of `spvtpm`, so an error
in the format's text, in the package, or here shows as a difference. Run it from the root of the repository:

    .venv/bin/python tests/vectors/generate_sp_secret.py

All inputs are constants, so that the files come out the same every time. A file is text: comment lines that begin with `#`,
then lines `name: value`. `expect` is `ok`, or the code of the error that a reader must give. `from` and `to` are generations,
in decimal; `fleet-id`, `secret` (of the generation `from`) and `result` (of `to`) are hexadecimal.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

FOLDER = Path(__file__).parent / "sp_secret"
FLEET_ID = hashlib.sha256(b"spvtpm sp secret vector: fleet id").digest()[:16]
SECRET = hashlib.sha256(b"spvtpm sp secret vector: secret").digest()

GOOD = {
    "ok-same-generation": ("No step: the secret itself.", 7, 7),
    "ok-one-step": ("One step down.", 2, 1),
    "ok-some-steps": ("From 300 to 255, over the border of a byte.", 300, 255),
    "ok-whole-ladder": ("From the top to the first generation.", 1024, 1),
}
BAD = {
    "bad-newer": ("A newer generation than the secret's.", 1, 2),
    "bad-zero": ("There is no generation 0.", 5, 0),
    "bad-too-high": ("There is none above 1,024.", 1025, 1024),
}


def step(secret: bytes, fleet_id: bytes, generation: int) -> bytes:
    """HKDF-SHA-256 with one block of output, as RFC 5869 writes it: extract, then expand."""
    key = hmac.digest(fleet_id, secret, "sha256")
    return hmac.digest(key, b"spvtpm sp secret v1" + generation.to_bytes(2, "big") + b"\x01", "sha256")


def ladder(secret: bytes, fleet_id: bytes, start: int, end: int) -> bytes:
    """All steps."""
    for generation in range(start - 1, end - 1, -1):
        secret = step(secret, fleet_id, generation)
    return secret


def vectors() -> dict[str, str]:
    """The content of each file by its name."""
    found = {}
    for name, (comment, start, end) in (GOOD | BAD).items():
        lines = [f"# {comment}", f"expect: {'ok' if name in GOOD else 'generation'}", f"from: {start}", f"to: {end}"]
        lines += [f"fleet-id: {FLEET_ID.hex()}", f"secret: {SECRET.hex()}"]
        if name in GOOD:
            lines.append(f"result: {ladder(SECRET, FLEET_ID, start, end).hex()}")
        found[name] = "\n".join(lines) + "\n"
    return found


if __name__ == "__main__":
    for name, text in vectors().items():
        (FOLDER / f"{name}.txt").write_text(text)
