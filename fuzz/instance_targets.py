"""The target for instance files: hostile bytes, damage, chunks out of place, and authentic files gone wrong.

Files are sealed by the implementation written against the format's text (tests/vectors), and opened by the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from tests.vectors.generate_instance import HIBERNATED, SMALL, THREE_CHUNKS, THREE_OTHER_CHUNKS
from tests.vectors.instance_format import CHUNK, TAG, File

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.wire.errors import InstanceFileError, WrongInstanceKeys
from spvtpm.wire.instance_content import encode_content
from spvtpm.wire.instance_file import (
    HEADER_BYTES,
    MAX_FILE_BYTES,
    Instance,
    InstanceReader,
    InstanceSecrets,
    UserSecret,
    parse_instance_header,
)

_SECRETS = InstanceSecrets(UserSecret(SMALL.user_secret), SMALL.sp_secret)
_GENUINE = (SMALL, HIBERNATED, THREE_CHUNKS, THREE_OTHER_CHUNKS)
_MOST_PIECES = 64


@cache
def _sealed(file: File) -> bytes:
    return file.sealed()


def _opened(program: Program, file: bytes) -> Instance | None:
    """What the file holds, read in pieces; None if it was refused."""
    reader = InstanceReader(lambda _header: _SECRETS)
    step = max(1, len(file) // _MOST_PIECES, program.choose((1, 7, 1000, MAX_FILE_BYTES)))
    header = None
    try:
        for start in range(0, len(file), step):
            header = reader.feed(file[start : start + step]) or header
        instance = reader.finish()
    except (InstanceFileError, WrongInstanceKeys) as error:
        str(error).encode()
        return None
    assert header == instance.header == parse_instance_header(file), "the header says one thing"
    assert instance.header.hibernated == (instance.volatile is not None), (
        "a volatile state comes with hibernation alone"
    )
    return instance


def _whole_or_nothing(program: Program, file: bytes) -> None:
    opened = _opened(program, file) is not None
    assert opened == (file in map(_sealed, _GENUINE)), "a file opens if it is what was sealed, and only then"


def _rearranged(program: Program) -> bytes:
    """Header and chunks of two genuine files, in some order."""
    places = [
        (0, HEADER_BYTES),
        *((HEADER_BYTES + n * (CHUNK + TAG), HEADER_BYTES + (n + 1) * (CHUNK + TAG)) for n in range(3)),
    ]
    parts = [(file, place) for place in places for file in (THREE_CHUNKS, THREE_OTHER_CHUNKS)]
    taken = [program.choose(parts) for _ in range(program.below(6))]
    return b"".join(_sealed(file)[begin:end] for file, (begin, end) in taken)


def _authentic_header(program: Program) -> File:
    """Fields of any value, and the right tag over them."""
    return replace(
        SMALL,
        hibernated=bool(program.below(2)),
        instance_version=program.choose((0, 1, (1 << 63) - 1, 1 << 63, program.number(8))),
        created=program.choose((0, 253_402_300_799, 253_402_300_800, program.number(8))),
        generation=program.choose((0, 1, program.number(4))),
        reserved_flags=program.choose((0, 0, 0, program.number(2) & 0xFFFE)),
        reserved=program.choose((0, 0, 0, program.number(4))),
        format_version=program.choose((1, 1, 1, program.number(2))),
        announced=program.choose((None, None, program.number(4), len(SMALL.packed()) + 1)),
    )


def fuzz_instance_file(data: bytes) -> None:
    """An instance file: opened if it is what was sealed, or what could have been; otherwise refused."""
    program = Program(data)
    kind = program.below(5)
    if kind == 0:
        _whole_or_nothing(program, program.rest())
    elif kind == 1:
        _whole_or_nothing(program, program.damage(_sealed(program.choose(_GENUINE))))
    elif kind == 2:
        _whole_or_nothing(program, _rearranged(program))
    elif kind == 3:
        file = _authentic_header(program)
        instance = _opened(program, file.sealed())
        if instance is not None:
            header = instance.header
            read = (header.version, header.created_s, header.generation, header.hibernated)
            assert read == (file.instance_version, file.created, file.generation, file.hibernated), (
                "fields are read as written"
            )
    else:
        genuine = program.choose((SMALL, HIBERNATED))
        file = replace(genuine, content=program.damage(genuine.packed()) if program.below(4) else program.rest())
        instance = _opened(program, file.sealed())
        assert instance is None or encode_content(instance) == file.content, "a content has one encoding"


def _seeds() -> Sequence[bytes]:
    return (
        b"\0\3" + _sealed(SMALL),
        b"\0\1" + _sealed(HIBERNATED),
        *(bytes([1, number]) for number in range(len(_GENUINE))),
        b"\2\4\0\2\4\6",
        b"\2\4\1\3\5\7",
        b"\3",
        b"\3\1\1\0\1",
        b"\4\0\0" + SMALL.packed(),
        b"\4\1\0" + HIBERNATED.packed(),
        b"\4\0\1\5\x40\1\1\xc4",
    )


INSTANCE_TARGETS = (
    Target(
        "instance_file",
        "an exported vTPM's file: header, chunks, content",
        fuzz_instance_file,
        _seeds,
        (
            b"SPVTPMIF\0\1",
            b"\xa9permanent",
            b"\xa8volatile",
            b"\xa6policy",
            b"\xa5label",
            b"\xa5chips",
            b"\xa9pcr_banks",
        ),
        examples=500,
    ),
)
