"""The mailbox frame's test vectors, run by the package; another implementation can run the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

from spvtpm.wire import mailbox
from spvtpm.wire.errors import MailboxError
from spvtpm.wire.mailbox import Direction, Session
from tests.vectors import generate_mailbox

FOLDER = Path(generate_mailbox.__file__).parent / "mailbox"
FILES = sorted(FOLDER.glob("*.txt"))
GOOD = [file for file in FILES if file.stem.startswith("ok-")]
BAD = [file for file in FILES if not file.stem.startswith("ok-")]


def _read(file: Path) -> tuple[str, dict[str, bytes]]:
    """What is expected, and all other values."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    values = dict(line.split(": ") for line in lines)
    return values.pop("expect"), {name: bytes.fromhex(value) for name, value in values.items()}


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _session(values: dict[str, bytes]) -> Session:
    boot_key = mailbox.derive_boot_key(values["vm-key"], values["vm-id"], values["boot-id"])
    return mailbox.derive_session(boot_key, values["sp-nonce"], values["vm-nonce"])


def _open(values: dict[str, bytes]) -> tuple[int, bytes]:
    """Sequence and payload, read as the driver and the SP read them."""
    direction, frame = Direction(_number(values["direction"])), values["frame"]
    header = mailbox.parse_header(frame, direction)
    return header.sequence, _session(values).open(direction, header, _number(values["address"]), frame)


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.stem)
def test_a_good_frame_opens(file: Path) -> None:
    expected, values = _read(file)
    assert expected == "ok"
    assert mailbox.derive_boot_key(values["vm-key"], values["vm-id"], values["boot-id"]) == values["boot-key"]
    assert _open(values) == (_number(values["sequence"]), values["payload"])


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.stem)
def test_the_same_payload_is_sealed_to_the_same_frame(file: Path) -> None:
    _expected, values = _read(file)
    direction, address = Direction(_number(values["direction"])), _number(values["address"])
    sealed = _session(values).seal(direction, _number(values["sequence"]), address, values["payload"])
    assert sealed == values["frame"][: len(sealed)]
    assert len(sealed) == mailbox.OVERHEAD_BYTES + len(values["payload"])


@pytest.mark.attack("A11")
@pytest.mark.parametrize("file", BAD, ids=lambda file: file.stem)
def test_a_bad_frame_is_refused(file: Path) -> None:
    expected, values = _read(file)
    with pytest.raises(MailboxError) as refused:
        _open(values)
    assert refused.value.code == expected


def test_the_files_are_what_the_independent_implementation_writes() -> None:
    written = {file.stem: file.read_text() for file in FILES}
    assert written == {vector.name: vector.text() for vector in generate_mailbox.vectors()}
