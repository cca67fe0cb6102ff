"""The ladder of `SpSecret`s: down, never up; the vectors of an independent implementation; nothing shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.processor.sp_secret import SpSecret
from spvtpm.wire.errors import GenerationError
from spvtpm.wire.generations import ladder_down
from tests.vectors import generate_sp_secret

FOLDER = Path(generate_sp_secret.__file__).parent / "sp_secret"
FILES = sorted(FOLDER.glob("*.txt"))
FLEET_ID, VALUE = b"f" * 16, b"SP-SECRET-OF-THIRTY-TWO-BYTES-!!"


def _read(file: Path) -> dict[str, str]:
    return dict(line.split(": ") for line in file.read_text().splitlines() if not line.startswith("#"))


def _run(vector: dict[str, str]) -> bytes:
    secret, fleet_id = bytes.fromhex(vector["secret"]), bytes.fromhex(vector["fleet-id"])
    return ladder_down(secret, fleet_id, int(vector["from"]), int(vector["to"]))


@pytest.mark.claim("B7")
@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("ok-")], ids=lambda file: file.stem)
def test_a_good_vector_gives_its_result(file: Path) -> None:
    vector = _read(file)
    assert vector["expect"] == "ok"
    assert _run(vector).hex() == vector["result"]


@pytest.mark.claim("B7")
@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("bad-")], ids=lambda file: file.stem)
def test_a_bad_vector_is_refused(file: Path) -> None:
    vector = _read(file)
    with pytest.raises(GenerationError) as refused:
        _run(vector)
    assert refused.value.code == vector["expect"]


def test_the_files_are_what_the_independent_implementation_writes() -> None:
    assert {file.stem: file.read_text() for file in FILES} == generate_sp_secret.vectors()


@pytest.mark.claim("B7")
@given(st.integers(1, 1024), st.data())
def test_it_does_not_matter_where_one_rests_on_the_way_down(start: int, data: st.DataObject) -> None:
    end = data.draw(st.integers(1, start))
    middle = data.draw(st.integers(end, start))
    secret = SpSecret(FLEET_ID, start, VALUE)
    assert secret.at(middle).at(end) == secret.at(end)


@pytest.mark.claim("B7")
def test_every_generation_has_a_secret_of_its_own() -> None:
    secret, seen = SpSecret(FLEET_ID, 1024, VALUE), set()
    while True:
        seen.add(secret.value)
        if secret.generation == 1:
            break
        secret = secret.at(secret.generation - 1)
    assert len(seen) == 1024


@pytest.mark.claim("B7")
def test_a_newer_generation_is_refused_and_no_step_leads_there_by_accident() -> None:
    old = SpSecret(FLEET_ID, 5, VALUE).at(4)
    with pytest.raises(GenerationError, match="newer"):
        old.at(5)
    assert VALUE not in {old.at(generation).value for generation in range(1, 5)}


def test_another_fleet_gets_other_secrets() -> None:
    assert ladder_down(VALUE, b"g" * 16, 2, 1) != ladder_down(VALUE, FLEET_ID, 2, 1)


@pytest.mark.parametrize(
    ("fleet_id", "generation", "value"),
    [(b"f" * 15, 1, VALUE), (FLEET_ID, 0, VALUE), (FLEET_ID, 1025, VALUE), (FLEET_ID, 1, VALUE[1:])],
)
def test_what_is_no_secret_of_a_fleet_cannot_be_made(fleet_id: bytes, generation: int, value: bytes) -> None:
    with pytest.raises(ValueError, match=r"16 bytes|from 1 to"):
        SpSecret(fleet_id, generation, value)


def test_a_secret_of_another_size_has_no_ladder() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        ladder_down(VALUE[1:], FLEET_ID, 2, 1)


@pytest.mark.attack("A24")
def test_the_representation_hides_the_value() -> None:
    shown = repr(SpSecret(FLEET_ID, 3, VALUE))
    assert shown == str(SpSecret(FLEET_ID, 3, VALUE)) == f"SpSecret(fleet_id={FLEET_ID.hex()}, generation=3)"
