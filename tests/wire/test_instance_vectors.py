"""The instance file's test vectors, run by the package; another implementation can run the same files."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from spvtpm.wire import instance_file
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.instance_file import (
    Instance,
    InstanceHeader,
    InstanceReader,
    InstanceSecrets,
    Policy,
    UserSecret,
    open_instance,
    parse_instance_header,
    seal_instance,
)
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement
from tests.vectors import generate_instance

FOLDER = Path(generate_instance.__file__).parent / "instance"
FILES = sorted(FOLDER.glob("*.txt"))
GOOD = [file for file in FILES if file.stem.startswith("ok-")]
BAD = [file for file in FILES if not file.stem.startswith("ok-")]
DOWNGRADES = [file for file in BAD if file.stem.startswith("bad-format-version")]
LONGEST_TEXT_BYTES = 100 * 1024
PIECE_BYTES = 4099
"""Of long files; short ones are fed byte by byte."""


@cache
def _read(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split(": ") for line in lines)


def _secrets(values: dict[str, str]) -> InstanceSecrets:
    user, sp = bytes.fromhex(values["user-secret"]), bytes.fromhex(values["sp-secret"])
    return InstanceSecrets(UserSecret(user), sp)


def _state(values: dict[str, str], name: str) -> bytes | None:
    if f"{name}-seed" in values:
        return hashlib.shake_256(bytes.fromhex(values[f"{name}-seed"])).digest(int(values[f"{name}-size"]))
    return bytes.fromhex(values[name]) if name in values else None


def _instance(values: dict[str, str]) -> Instance:
    header = InstanceHeader(
        vtpm_id=uuid.UUID(values["vtpm-id"]),
        vm_id=uuid.UUID(values["vm-id"]),
        fleet_id=bytes.fromhex(values["fleet-id"]),
        version=int(values["instance-version"], 16),
        generation=int(values["generation"], 16),
        created_s=int(values["created"], 16),
        hibernated=values["kind"] == "hibernated",
    )
    chips = None if values["chips"] == "any" else frozenset(map(bytes.fromhex, values["chips"].split()))
    policy = Policy(
        migration_allowed=values["migration-allowed"] == "01",
        chips=chips,
        minimum_firmware=int(values["minimum-firmware"], 16),
        direct_path_only=values["direct-path-only"] == "01",
        pcr_banks=frozenset(values.get("pcr-banks", "").split()),
    )
    certificates, issuer = (
        tuple(map(bytes.fromhex, values.get(name, "").split())) for name in ("ek-certificates", "issuer")
    )
    endorsement = VtpmEndorsement(certificates=certificates, issuer=(issuer[0], issuer[1], issuer[2]))
    permanent = _state(values, "permanent")
    assert permanent is not None
    label = bytes.fromhex(values.get("label", "")).decode()
    return Instance(header, permanent, _state(values, "volatile"), policy, endorsement, label)


def _seal(values: dict[str, str]) -> bytes:
    """Seals as the vector says, with its salt."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(instance_file, "_fresh_salt", lambda: bytes.fromhex(values["salt"]))
        return seal_instance(_instance(values), _secrets(values))


@cache
def _file(vector: Path) -> bytes:
    """The file that a vector shows, from its bytes, from another vector's, or sealed."""
    values = _read(vector)
    if "base" in values:
        base = _file(FOLDER / f"{values['base']}.txt")
        ranges = [part.split("-") for part in values["ranges"].split()]
        file = b"".join(base[int(begin) : int(end)] for begin, end in ranges)
    elif "file" in values:
        file = bytes.fromhex(values["file"])
    else:
        file = _seal(values)
    assert len(file) == int(values["file-size"])
    assert hashlib.sha256(file).hexdigest() == values["file-sha256"]
    return file


def _pieces(file: bytes) -> Iterator[bytes]:
    size = 1 if len(file) < 2 * PIECE_BYTES else PIECE_BYTES
    return (file[start : start + size] for start in range(0, len(file), size))


def _open_in_pieces(file: bytes, secrets: InstanceSecrets) -> Instance:
    reader = InstanceReader(lambda _header: secrets)
    headers = [header for piece in _pieces(file) if (header := reader.feed(piece))]
    instance = reader.finish()
    assert headers == [instance.header], "the header is given once"
    return instance


@pytest.mark.claim("C6a")
@pytest.mark.parametrize("vector", GOOD, ids=lambda vector: vector.stem)
def test_a_good_file_opens_whole_and_in_pieces(vector: Path) -> None:
    values = _read(vector)
    assert values["expect"] == "ok"
    file, secrets, expected = _file(vector), _secrets(values), _instance(values)
    assert parse_instance_header(file) == expected.header
    assert open_instance(file, secrets) == expected
    assert _open_in_pieces(file, secrets) == expected


@pytest.mark.claim("C6b")
@pytest.mark.claim("C4")
@pytest.mark.parametrize("vector", GOOD, ids=lambda vector: vector.stem)
def test_the_same_instance_is_sealed_to_the_same_file(vector: Path) -> None:
    assert _seal(_read(vector)) == _file(vector)


@pytest.mark.attack("A06")
@pytest.mark.attack("A07")
@pytest.mark.parametrize("vector", BAD, ids=lambda vector: vector.stem)
def test_a_bad_file_is_refused_whole_and_in_pieces(vector: Path) -> None:
    values = _read(vector)
    file, secrets = _file(vector), _secrets(values)
    for attempt in (open_instance, _open_in_pieces):
        with pytest.raises(SpvtpmError) as refused:
            attempt(file, secrets)
        assert refused.value.code == values["expect"]


@pytest.mark.attack("A26")
@pytest.mark.parametrize("vector", DOWNGRADES, ids=lambda vector: vector.stem)
def test_a_file_of_another_format_version_is_refused_before_its_secrets_are_asked_for(vector: Path) -> None:
    reader = InstanceReader(lambda _header: pytest.fail("asked for secrets"))
    with pytest.raises(SpvtpmError) as refused:
        reader.feed(_file(vector))
        reader.finish()
    assert refused.value.code == "instance-format"


def test_the_files_are_what_the_independent_implementation_writes() -> None:
    written = {file.stem: file.read_text() for file in FILES}
    assert written == {vector.name: vector.text() for vector in generate_instance.vectors()}


def test_the_files_are_small() -> None:
    assert max(file.stat().st_size for file in FILES) <= LONGEST_TEXT_BYTES
