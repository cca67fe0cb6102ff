"""Orders are kept whole; what cannot be believed is no order; of what is absent, the newest are remembered."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from spvtpm.hypervisor import records as records_module
from spvtpm.hypervisor.records import Record, Records


def test_a_record_comes_back_as_it_was_put(tmp_path: Path) -> None:
    record = Record(vm_id=uuid.uuid4(), sequence=7, want="running", resuming=True, failure="a sentence")
    Records(tmp_path / "orders").put(record)

    assert Records(tmp_path / "orders").load() == [record]


@pytest.mark.parametrize("content", [b"", b"{", b"null", b'{"format": 2}', b"\xff", b"[" * 10_000])
def test_a_damaged_record_is_as_good_as_none_and_can_be_put_again(tmp_path: Path, content: bytes) -> None:
    records = Records(tmp_path)
    record = Record(vm_id=uuid.uuid4(), sequence=1, want="running")
    records.put(record)
    (tmp_path / str(record.vm_id)).write_bytes(content)

    assert records.load() == []
    records.put(record)
    assert records.load() == [record]


def test_a_record_under_another_vms_name_is_none(tmp_path: Path) -> None:
    records = Records(tmp_path)
    record = Record(vm_id=uuid.uuid4(), sequence=1, want="running")
    records.put(record)
    (tmp_path / str(record.vm_id)).rename(tmp_path / str(uuid.uuid4()))

    assert records.load() == []


def test_a_write_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    left = tmp_path / ".half"
    left.write_bytes(b"{")

    assert Records(tmp_path).load() == []
    assert not left.exists()


def test_of_absent_vms_the_newest_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MAX_ABSENT", 2)
    records = Records(tmp_path)
    made = [Record(vm_id=uuid.uuid4(), sequence=number, want="absent") for number in range(1, 4)]
    for age, record in enumerate(reversed(made)):
        records.put(record)
        os.utime(tmp_path / str(record.vm_id), (1000 - age, 1000 - age))
    there = Record(vm_id=uuid.uuid4(), sequence=1, want="running")
    records.put(there)

    assert {record.vm_id for record in records.load()} == {made[1].vm_id, made[2].vm_id, there.vm_id}
    assert len(list(tmp_path.iterdir())) == 3
