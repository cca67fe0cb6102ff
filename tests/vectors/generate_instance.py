"""Writes the test vectors of the instance file, with the implementation in instance_format.py, which knows no `spvtpm`.

Run it from the root of the repository:

    .venv/bin/python -m tests.vectors.generate_instance

All inputs are constants, so that the files come out the same every time. docs/formats/instance-file.md, "Check a file
with the test vectors", says what stands in a file. A file whose bytes would be long says instead how they are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.vectors.instance_format import (
    CHUNK,
    HEADER,
    LONGEST_CONTENT,
    LONGEST_IN_HEX,
    NIL,
    TAG,
    TRUE,
    Content,
    File,
    State,
    constant,
    pack_array,
    pack_bin,
    pack_map,
    pack_number,
    pack_str,
)

FOLDER = Path(__file__).parent / "instance"

OK = "ok"
MALFORMED, OTHER_FORMAT, WRONG_KEYS = "bad-instance-file", "instance-format", "instance-keys"
DAMAGED, TRUNCATED, OVERLONG = "instance-damaged", "instance-truncated", "instance-overlong"


@dataclass(frozen=True)
class Vector:
    """One vector: a file, who reads it with which secrets, and what must come of it."""

    name: str
    shows: str
    expect: str
    data: bytes
    user_secret: bytes = File.user_secret
    sp_secret: bytes = File.sp_secret
    made_of: File | None = None
    base: str = ""
    ranges: tuple[tuple[int, int], ...] = ()

    def text(self) -> str:
        """The file's content."""
        values = {"user-secret": self.user_secret.hex(), "sp-secret": self.sp_secret.hex()}
        if self.made_of is not None:
            values |= _recipe(self.made_of)
        if self.base:
            values |= {"base": self.base, "ranges": " ".join(f"{begin}-{end}" for begin, end in self.ranges)}
        elif len(self.data) <= HEADER + 3 * LONGEST_IN_HEX:
            values["file"] = self.data.hex()
        values |= {"file-size": str(len(self.data)), "file-sha256": hashlib.sha256(self.data).hexdigest()}
        lines = [f"# {self.shows}", f"expect: {self.expect}", *(f"{name}: {value}" for name, value in values.items())]
        return "\n".join(lines) + "\n"


def _hex(values: tuple[bytes, ...]) -> str:
    return " ".join(value.hex() for value in values)


def _recipe(file: File) -> dict[str, str]:
    content = file.content
    assert isinstance(content, Content)
    header_key, payload_key, check = file.keys()
    packed = file.packed()
    return {
        "vtpm-id": file.vtpm_id.hex(),
        "vm-id": file.vm_id.hex(),
        "fleet-id": file.fleet_id.hex(),
        "instance-version": f"{file.instance_version:016x}",
        "created": f"{file.created:016x}",
        "generation": f"{file.generation:08x}",
        "salt": file.salt.hex(),
        "kind": "hibernated" if file.hibernated else "shut-down",
        **content.permanent.lines("permanent"),
        **({} if content.volatile is None else content.volatile.lines("volatile")),
        "migration-allowed": f"{content.migration_allowed:02x}",
        "chips": "any" if content.chips is None else _hex(content.chips),
        "minimum-firmware": f"{content.minimum_firmware:08x}",
        "direct-path-only": f"{content.direct_path_only:02x}",
        **({"pcr-banks": " ".join(content.pcr_banks)} if content.pcr_banks else {}),
        **({"ek-certificates": _hex(content.certificates)} if content.certificates else {}),
        "issuer": _hex(content.issuer),
        **({"label": content.label.encode().hex()} if content.label else {}),
        "header-key": header_key.hex(),
        "payload-key": payload_key.hex(),
        "key-check": check.hex(),
        "content-size": str(len(packed)),
        "content-sha256": hashlib.sha256(packed).hexdigest(),
    }


def _with_content_of(size: int, label: str) -> File:
    """A file whose content has exactly this size."""
    besides = len(Content(State.of_size(label, size - 500)).packed()) - (size - 500)
    file = File(Content(State.of_size(label, size - besides)), salt=constant(f"salt of {label}", 32))
    assert len(file.packed()) == size
    return file


SMALL = File()
HIBERNATED = File(
    Content(
        State(constant("permanent of the hibernated", 60)),
        State(constant("volatile of the hibernated", 60)),
        migration_allowed=False,
        chips=tuple(sorted(constant(f"chip {number}", 16) for number in range(2))),
        minimum_firmware=70_000,
        direct_path_only=True,
        pcr_banks=("sha1", "sha256", "sha384"),
        label="Straße 7, 数据库",
    ),
    hibernated=True,
    salt=constant("salt of the hibernated", 32),
)
SMALLEST = File(
    Content(State(b"\x00"), minimum_firmware=0, pcr_banks=(), certificates=(), issuer=(b"\x00",) * 3, label=""),
    instance_version=1,
    created=0,
    generation=1,
)
HIGHEST = File(instance_version=(1 << 63) - 1, created=253_402_300_799, generation=0xFFFF_FFFF)
ON_BOUNDARY = _with_content_of(CHUNK, "on the boundary")
OVER_BOUNDARY = _with_content_of(CHUNK + 1, "over the boundary")
THREE_CHUNKS = _with_content_of(2 * CHUNK + 100, "three chunks")
THREE_OTHER_CHUNKS = _with_content_of(2 * CHUNK + 100, "three other chunks")
LARGEST = File(
    Content(
        State.of_size("largest permanent", 262_144),
        State.of_size("largest volatile", 65_536),
        chips=tuple(sorted(constant(f"chip {number}", 16) for number in range(256))),
        minimum_firmware=0xFFFF_FFFF,
        pcr_banks=tuple(f"a_bank_numbered_{letter}"[-16:] for letter in "abcdefghijklmnop"),
        certificates=tuple(constant(f"EK certificate {number}", 2048) for number in range(8)),
        issuer=tuple(constant(f"issuer {number}", 2048) for number in range(3)),
        label="\U0001f512" * 256,
    ),
    hibernated=True,
    salt=constant("salt of the largest", 32),
)


def _good(name: str, shows: str, file: File) -> Vector:
    return Vector(name, shows, OK, file.sealed(), made_of=file)


def _bad(name: str, shows: str, expect: str, file: File | bytes, **reader: bytes) -> Vector:
    data = file.sealed() if isinstance(file, File) else file
    return Vector(name, shows, expect, data, **reader)  # type: ignore[arg-type]


def _cut(name: str, shows: str, expect: str, base: tuple[str, File], *ranges: tuple[int, int]) -> Vector:
    whole = base[1].sealed()
    data = b"".join(whole[begin:end] for begin, end in ranges)
    return Vector(name, shows, expect, data, base=base[0], ranges=ranges)


def flipped(data: bytes, offset: int, bit: int = 0) -> bytes:
    """The data with one bit changed."""
    altered = bytearray(data)
    altered[offset] ^= 1 << bit
    return bytes(altered)


def _good_vectors() -> Iterator[Vector]:
    yield _good("ok-shut-down", "A vTPM that was shut down: no volatile state.", SMALL)
    yield _good("ok-hibernated", "A hibernated vTPM, with each part of the policy in use.", HIBERNATED)
    yield _good(
        "ok-smallest",
        "The least of everything: a state of one byte, no label, no banks, no EK certificates, zeros.",
        SMALLEST,
    )
    yield _good("ok-highest-numbers", "The highest instance version, time and generation.", HIGHEST)
    yield _good("ok-on-chunk-boundary", "A content of 65,536 bytes: one full chunk, which is the last.", ON_BOUNDARY)
    yield _good("ok-over-chunk-boundary", "A content of 65,537 bytes: the second chunk has one byte.", OVER_BOUNDARY)
    yield _good("ok-three-chunks", "Three chunks.", THREE_CHUNKS)
    yield _good(
        "ok-three-other-chunks", "Another vTPM's state, of the same size, under another salt.", THREE_OTHER_CHUNKS
    )
    yield _good(
        "ok-largest",
        "The most of everything: both states, chips, banks, certificates and label at their bounds.",
        LARGEST,
    )


def _altered_headers() -> Iterator[Vector]:
    """One bit changed on the way; the tag is that of the genuine header."""
    whole = SMALL.sealed()
    for name, offset, expect in (
        *(("magic", 0, MALFORMED), ("format-version", 9, OTHER_FORMAT), ("kind", 11, DAMAGED)),
        *(("content-size", 15, DAMAGED), ("vtpm-id", 16, WRONG_KEYS), ("vm-id", 32, DAMAGED)),
        *(("fleet-id", 48, WRONG_KEYS), ("instance-version", 71, DAMAGED), ("created", 79, DAMAGED)),
        *(("generation", 83, WRONG_KEYS), ("salt", 88, WRONG_KEYS), ("key-check", 120, WRONG_KEYS)),
        ("header-tag", 152, DAMAGED),
    ):
        yield _bad(f"bad-{name}-altered", f"A bit is flipped at offset {offset}.", expect, flipped(whole, offset))
    for bit in range(1, 16):
        name, shows = f"bad-reserved-flag-{bit:02}", f"Flag bit {bit}, which is reserved, is set; the tag is right."
        yield _bad(name, shows, MALFORMED, replace(SMALL, reserved_flags=1 << bit))
    for bit in range(32):
        name, shows = f"bad-reserved-{bit:02}", f"Bit {bit} of the reserved field is set; the tag is right."
        yield _bad(name, shows, MALFORMED, replace(SMALL, reserved=1 << bit))


def _wrong_headers() -> Iterator[Vector]:
    """Out of bounds, and all tags are right."""
    size = len(SMALL.packed())
    yield _bad("bad-magic", "Another magic; the tag is right.", MALFORMED, replace(SMALL, magic=b"SPVTPMIG"))
    for number in (0, 2, 0xFFFF):
        name, shows = f"bad-format-version-{number}", f"Format version {number}; the tag is right."
        yield _bad(name, shows, OTHER_FORMAT, replace(SMALL, format_version=number))
    shows = "The first ten bytes of format version 2, whose header may be shorter."
    yield _bad("bad-format-version-cut", shows, OTHER_FORMAT, b"SPVTPMIF\x00\x02")
    for name, shows, file in (
        ("instance-version-zero", "Instance version 0 is never used", replace(SMALL, instance_version=0)),
        ("instance-version-too-large", "Instance version 2^63", replace(SMALL, instance_version=1 << 63)),
        ("created-too-large", "Made in the year 10000", replace(SMALL, created=253_402_300_800)),
        ("generation-zero", "Generation 0 is never used", replace(SMALL, generation=0)),
        ("content-size-zero", "No content, and no chunk", replace(SMALL, content=b"")),
        ("content-size-too-large", "It announces 360,449 bytes", replace(SMALL, announced=LONGEST_CONTENT + 1)),
        ("content-size-huge", "It announces 4 GiB - 1", replace(SMALL, announced=0xFFFF_FFFF)),
    ):
        yield _bad(f"bad-{name}", f"{shows}; the tag is right.", MALFORMED, file)
    shows = "It announces one byte {} than was sealed; the header's tag is right."
    yield _bad("bad-content-size-less", shows.format("less"), DAMAGED, replace(SMALL, announced=size - 1))
    yield _bad("bad-content-size-more", shows.format("more"), TRUNCATED, replace(SMALL, announced=size + 1))
    yield _bad("bad-nothing", "No instance file: zeros.", MALFORMED, bytes(400))
    yield _bad("bad-beginning", "Three bytes that no instance file begins with.", MALFORMED, b"SPX")


def _wrong_bodies() -> Iterator[Vector]:
    """Chunks that are genuine, but not at their place; and those sealed wrongly with the right key."""
    whole = SMALL.sealed()
    yield _bad("bad-ciphertext", "A bit of the ciphertext is flipped.", DAMAGED, flipped(whole, HEADER))
    yield _bad("bad-tag", "The last bit of the last tag is flipped.", DAMAGED, flipped(whole, len(whole) - 1))
    shows = "The last byte of the nonce is 0, though no chunk follows."
    yield _bad("bad-last-chunk-unmarked", shows, DAMAGED, replace(SMALL, last_bytes=(0,)))
    yield _bad("bad-last-byte-two", "The last byte of the nonce is 2.", DAMAGED, replace(SMALL, last_bytes=(2,)))
    yield _bad("bad-count-from-one", "Chunks are counted from 1.", DAMAGED, replace(SMALL, first_chunk=1))
    other_vm = replace(SMALL, vm_id=constant("other vm id", 16))
    shows = "Another header on this body: both genuine, and under the same keys, as only a reused salt can make them."
    yield _bad("bad-header-of-same-keys", shows, DAMAGED, other_vm.header() + whole[HEADER:])

    three, other = ("ok-three-chunks", THREE_CHUNKS), THREE_OTHER_CHUNKS
    step = CHUNK + TAG
    end = HEADER + 2 * step + 100 + TAG
    head, first, second, last = (
        (0, HEADER),
        (HEADER, HEADER + step),
        (HEADER + step, HEADER + 2 * step),
        (HEADER + 2 * step, end),
    )
    assert len(THREE_CHUNKS.sealed()) == len(other.sealed()) == end
    yield _cut("bad-chunks-swapped", "Chunks 0 and 1 are swapped.", DAMAGED, three, head, second, first, last)
    yield _cut(
        "bad-chunk-doubled", "Chunk 0 stands at the place of chunk 1, too.", DAMAGED, three, head, first, first, last
    )
    yield _cut("bad-chunk-inserted", "Chunk 1 stands twice.", DAMAGED, three, head, first, second, second, last)
    yield _cut("bad-first-chunk-dropped", "Chunk 0 is missing.", DAMAGED, three, head, second, last)
    yield _cut(
        "bad-middle-chunk-dropped",
        "Chunk 1 is missing, so the file ends too early.",
        TRUNCATED,
        three,
        head,
        first,
        last,
    )
    yield _cut("bad-last-chunk-dropped", "Chunk 2 is missing.", TRUNCATED, three, head, first, second)
    yield _cut("bad-last-chunk-doubled", "Chunk 2 stands twice.", OVERLONG, three, head, first, second, last, last)
    yield _cut("bad-header-doubled", "The header stands twice.", DAMAGED, three, head, head, first, second, last)


def _spliced() -> Iterator[Vector]:
    """Of two genuine files of the same owner, fleet and vTPM; small ones, so that the bytes can stand here."""
    ours, theirs = SMALL.sealed(), replace(SMALL, salt=constant("other salt", 32), instance_version=8).sealed()
    yield _bad(
        "bad-other-files-header", "The header of a later file on this body.", DAMAGED, theirs[:HEADER] + ours[HEADER:]
    )
    yield _bad(
        "bad-other-files-body", "The body of a later file under this header.", DAMAGED, ours[:HEADER] + theirs[HEADER:]
    )
    shows = "The version is raised to that of a later file, whose tag is taken along."
    yield _bad(
        "bad-other-files-version",
        shows,
        DAMAGED,
        ours[:64] + theirs[64:72] + ours[72:152] + theirs[152:184] + ours[184:],
    )


def _cut_short_or_long() -> Iterator[Vector]:
    small, three = ("ok-shut-down", SMALL), ("ok-three-chunks", THREE_CHUNKS)
    whole = SMALL.sealed()
    size = len(whole)
    for name, shows, kept in (
        ("empty", "No bytes at all.", 0),
        ("in-magic", "It ends inside the magic.", 5),
        ("in-format-version", "It ends inside the format version.", 9),
        ("after-format-version", "It ends behind the format version.", 10),
        ("before-header-tag", "The header's tag is missing.", 152),
        ("in-header-tag", "It ends one byte before the header does.", HEADER - 1),
        ("after-header", "The header alone.", HEADER),
        ("in-chunk", "It ends after one byte of the body.", HEADER + 1),
        ("before-tag", "The last tag is missing.", size - TAG),
        ("in-tag", "The last byte is missing.", size - 1),
    ):
        yield _cut(f"bad-cut-{name}", shows, TRUNCATED, small, (0, kept))
    step = CHUNK + TAG
    for name, shows, kept in (
        ("after-chunk-0", "It ends behind chunk 0 of three.", HEADER + step),
        ("in-chunk-1", "It ends inside chunk 1 of three.", HEADER + step + 1000),
        ("in-chunk-2", "It ends inside the last chunk of three.", HEADER + 2 * step + 50),
    ):
        yield _cut(f"bad-cut-{name}", shows, TRUNCATED, three, (0, kept))
    yield _cut("bad-trailing-byte", "One byte follows the file.", OVERLONG, small, (0, size), (0, 1))
    yield _cut("bad-trailing-file", "The file stands twice.", OVERLONG, small, (0, size), (0, size))
    yield _bad("bad-trailing-zeros", "Zeros follow the file.", OVERLONG, whole + bytes(16))


def _wrong_secrets() -> Iterator[Vector]:
    user, sp = constant("other user secret", 32), constant("other sp secret", 32)
    yield _bad("bad-user-secret", "The secret of another user.", WRONG_KEYS, SMALL, user_secret=user)
    yield _bad("bad-sp-secret", "Another fleet's secret, or another generation of it.", WRONG_KEYS, SMALL, sp_secret=sp)
    shows = "The right secrets, each in the place of the other."
    exchanged = {"user_secret": SMALL.sp_secret, "sp_secret": SMALL.user_secret}
    yield _bad("bad-secrets-exchanged", shows, WRONG_KEYS, SMALL, **exchanged)
    older = bytearray(SMALL.sealed())
    older[80:84] = (2).to_bytes(4, "big")
    yield _bad("bad-generation-lowered", "The header's generation is lowered from 3 to 2.", WRONG_KEYS, bytes(older))
    forger = replace(SMALL, user_secret=user, sp_secret=sp)
    yield _bad("bad-forged", "Made by somebody who has neither secret.", WRONG_KEYS, forger)
    shows = "The same, with the key-check value of a genuine file under the same salt."
    yield _bad("bad-forged-key-check", shows, DAMAGED, replace(forger, named_check=SMALL.keys()[2]))


def _wrong_contents() -> Iterator[Vector]:
    """Contents that nobody should have written, authentic all the same."""
    content, volatile = Content(), State(b"volatile")
    chip = constant("chip 0", 16)
    fields, policy, keys = content.fields(), content.policy(), content.endorsement()
    half_float = b"\xca\x40\x00\x00\x00"  # 2.0

    def altered(**values: bytes | None) -> Content:
        return replace(content, altered=values)

    shut_down: tuple[tuple[str, str, Content | bytes], ...] = (
        ("nothing", "A byte that MessagePack does not use", b"\xc1"),
        ("no-map", "An array of the five values", pack_array([value for _key, value in fields])),
        ("cut", "It ends before the label does", content.packed()[:-1]),
        ("byte-behind", "A byte behind the map", content.packed() + b"\x00"),
        ("nested", "Nested without end", b"\x91" * 5000),
        ("field-missing", "No label", altered(label=None)),
        ("field-unknown", "A field that the format does not name", pack_map([*fields, ("owner", NIL)])),
        ("field-doubled", "The label stands twice", pack_map([*fields, fields[-1]])),
        ("fields-reordered", "The label stands first", pack_map([fields[-1], *fields[:-1]])),
        ("policy-field-missing", "A policy that says nothing on chips", altered(chips=None)),
        ("policy-field-unknown", "A policy with more in it", altered(policy=pack_map([*policy, ("clones", TRUE)]))),
        ("policy-field-doubled", "A policy that says both", altered(policy=pack_map([*policy, ("chips", NIL)]))),
        ("policy-reordered", "A policy in another order", altered(policy=pack_map(policy[::-1]))),
        ("endorsement-missing", "Nothing on EK certificates", altered(endorsement=None)),
        ("endorsement-field-missing", "An endorsement without an issuer", altered(issuer=None)),
        (
            "endorsement-field-unknown",
            "An endorsement with more in it",
            altered(endorsement=pack_map([*keys, ("x", NIL)])),
        ),
        ("endorsement-field-doubled", "An endorsement that says both", altered(endorsement=pack_map([*keys, keys[0]]))),
        ("endorsement-reordered", "An endorsement in another order", altered(endorsement=pack_map(keys[::-1]))),
        ("endorsement-nil", "Nil where the endorsement belongs", altered(endorsement=NIL)),
        ("ek-certificates-too-many", "9 EK certificates", replace(content, certificates=(b"\x30",) * 9)),
        ("ek-certificate-empty", "An EK certificate of no bytes", replace(content, certificates=(b"",))),
        ("ek-certificate-long", "An EK certificate of 2,049 bytes", replace(content, certificates=(bytes(2049),))),
        ("ek-certificate-text", "An EK certificate as a text", altered(certificates=pack_array([pack_str(b"MII=")]))),
        ("issuer-short", "An issuer's chain of two", replace(content, issuer=content.issuer[:2])),
        ("issuer-long", "An issuer's chain of four", replace(content, issuer=(*content.issuer, b"\x30"))),
        ("issuer-nil", "The issuer's chain is nil", altered(issuer=NIL)),
        ("issuer-empty", "An issuer's certificate of no bytes", replace(content, issuer=(b"", *content.issuer[1:]))),
        (
            "issuer-certificate-long",
            "An issuer's certificate of 2,049 bytes",
            replace(content, issuer=(bytes(2049),) * 3),
        ),
        ("permanent-empty", "No permanent state", altered(permanent=pack_bin(b""))),
        ("permanent-nil", "The permanent state is nil", altered(permanent=NIL)),
        ("permanent-text", "The permanent state is a text", altered(permanent=pack_str(b"c3Rh"))),
        ("permanent-longer-form", "A length in more bytes than needed", altered(permanent=b"\xc5\x00\x04four")),
        ("volatile-of-shut-down", "A volatile state of a vTPM that was shut down", replace(content, volatile=volatile)),
        ("firmware-too-large", "Firmware 2^32", altered(minimum_firmware=pack_number(1 << 32))),
        ("firmware-negative", "Firmware -1", altered(minimum_firmware=b"\xff")),
        ("firmware-longer-form", "A number in more bytes than needed", altered(minimum_firmware=b"\xcc\x02")),
        ("firmware-float", "Firmware 2.0", altered(minimum_firmware=half_float)),
        ("bool-number", "1 where true belongs", altered(migration_allowed=b"\x01")),
        ("bool-nil", "Nil where true or false belongs", altered(direct_path_only=NIL)),
        ("chips-none", "A list of no chips", replace(content, chips=())),
        (
            "chips-too-many",
            "257 chips",
            replace(content, chips=tuple(bytes([0] * 14 + [n >> 8, n & 255]) for n in range(257))),
        ),
        ("chips-doubled", "The same chip twice", replace(content, chips=(chip, chip))),
        ("chips-unsorted", "Chips in descending order", replace(content, chips=(b"\xff" * 16, chip))),
        ("chip-short", "A chip id of 15 bytes", replace(content, chips=(chip[:15],))),
        ("chip-long", "A chip id of 17 bytes", replace(content, chips=(chip + b"\x00",))),
        ("banks-too-many", "17 banks", replace(content, pcr_banks=tuple(f"bank{n:02}" for n in range(17)))),
        ("banks-doubled", "The same bank twice", replace(content, pcr_banks=("sha256", "sha256"))),
        ("banks-unsorted", "Banks in descending order", replace(content, pcr_banks=("sha256", "sha1"))),
        ("bank-empty", "A bank without a name", replace(content, pcr_banks=("",))),
        ("bank-long", "A bank's name of 17 characters", replace(content, pcr_banks=("a" * 17,))),
        ("bank-upper-case", "A bank's name in capitals", replace(content, pcr_banks=("SHA256",))),
        ("bank-newline", "A bank's name with a newline behind it", replace(content, pcr_banks=("sha256\n",))),
        ("label-long", "A label of 257 characters", replace(content, label="x" * 257)),
        ("label-control", "A label that speaks to a terminal", replace(content, label="\x1b[2J")),
        ("label-c1-control", "The same, in one character", replace(content, label="\x9b2J")),
        ("label-newline", "A label with a newline behind it", replace(content, label="web 1\n")),
        ("label-not-utf8", "A label that is no UTF-8", altered(label=pack_str(b"\xff\xfe"))),
        ("label-nil", "The label is nil", altered(label=NIL)),
    )
    for name, shows, packed in shut_down:
        yield _bad(f"bad-content-{name}", f"{shows}; all tags are right.", MALFORMED, replace(SMALL, content=packed))
    for name, shows, packed in (
        ("volatile-missing", "A hibernated vTPM without a volatile state", content),
        ("volatile-empty", "A volatile state of no bytes", altered(volatile=pack_bin(b""))),
    ):
        file = replace(SMALL, content=packed, hibernated=True)
        yield _bad(f"bad-content-{name}", f"{shows}; all tags are right.", MALFORMED, file)


def vectors() -> Iterator[Vector]:
    """All vectors."""
    yield from _good_vectors()
    yield from _altered_headers()
    yield from _wrong_headers()
    yield from _wrong_bodies()
    yield from _spliced()
    yield from _cut_short_or_long()
    yield from _wrong_secrets()
    yield from _wrong_contents()


def main() -> None:
    """Writes the files anew."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for vector in vectors():
        (FOLDER / f"{vector.name}.txt").write_text(vector.text())


if __name__ == "__main__":
    main()
