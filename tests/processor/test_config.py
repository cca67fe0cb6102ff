"""The configuration file: what may stand in it, and that nothing else may."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spvtpm.processor.config import DEFAULT_TOML, SpConfig, load_config
from spvtpm.wire.errors import StorageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the configuration lies."""
    return tmp_path / "sp.toml"


def test_what_is_left_out_has_the_value_that_the_file_shows(path: Path) -> None:
    path.write_text("")
    default = load_config(path)
    assert default == SpConfig(allowed_uids=[os.geteuid()], max_vms=4096, park_after_s=60.0, spare_workers=2)

    path.write_text(DEFAULT_TOML)
    assert load_config(path) == default
    path.write_text(DEFAULT_TOML.replace("# allowed", "allowed").replace("# max", "max").replace("# park", "park"))
    assert load_config(path) == SpConfig(allowed_uids=[0], max_vms=4096, park_after_s=60.0, spare_workers=2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    uids=st.lists(st.integers(0, (1 << 32) - 1), max_size=64),
    max_vms=st.integers(1, 100_000),
    park_after_s=st.floats(0.05, 86_400),
    spare_workers=st.integers(0, 64),
)
def test_every_value_within_bounds_is_taken(
    path: Path, uids: list[int], max_vms: int, park_after_s: float, spare_workers: int
) -> None:
    path.write_text(
        f"allowed_uids = {uids}\nmax_vms = {max_vms}\npark_after_s = {park_after_s}\nspare_workers = {spare_workers}\n"
    )
    assert load_config(path) == SpConfig(
        allowed_uids=uids, max_vms=max_vms, park_after_s=park_after_s, spare_workers=spare_workers
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_vmz = 3", "max_vmz"),
        ("[security]\nmax_vms = 3", "security"),
        ("max_vms = 0", "max_vms"),
        ("max_vms = -1", "max_vms"),
        ("max_vms = 100_001", "max_vms"),
        ("max_vms = 1.5", "max_vms"),
        ("max_vms = true", "max_vms"),
        ('max_vms = "3"', "max_vms"),
        ("park_after_s = 0.049", "park_after_s"),
        ("park_after_s = nan", "park_after_s"),
        ("park_after_s = inf", "park_after_s"),
        ("park_after_s = -60", "park_after_s"),
        ("spare_workers = 65", "spare_workers"),
        ("spare_workers = -1", "spare_workers"),
        ("allowed_uids = 0", "allowed_uids"),
        ("allowed_uids = [-1]", "allowed_uids"),
        ("allowed_uids = [4294967296]", "allowed_uids"),
        ('allowed_uids = ["root"]', "allowed_uids"),
        (f"allowed_uids = {list(range(65))}", "allowed_uids"),
        ("max_vms = 1\nmax_vms = 2", ""),
        ("max_vms", ""),
        ("\xff\xfe", ""),
    ],
)
def test_a_key_that_is_unknown_or_out_of_bounds_is_named_with_the_file(path: Path, text: str, named: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError) as refusal:
        load_config(path)
    assert str(path) in str(refusal.value)
    assert named in str(refusal.value)


def test_without_a_file_everything_has_its_default(path: Path) -> None:
    assert load_config(path) == SpConfig()


def test_a_directory_is_no_configuration(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StorageError, match=f"cannot read {path}"):
        load_config(path)


def test_nobody_may_be_allowed_and_that_is_not_everybody(path: Path) -> None:
    path.write_text("allowed_uids = []")
    assert load_config(path).allowed_uids == []


def test_the_environment_says_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_VMS", "SPVTPM_MAX_VMS", "SP_MAX_VMS"):
        monkeypatch.setenv(name, "7")
    path.write_text("")
    assert load_config(path).max_vms == 4096
