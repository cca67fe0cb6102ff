"""Every fuzz target for a moment: saved inputs again, a bounded number of generated ones, and the compiled harnesses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import native
from fuzz.generate import explore
from fuzz.native import NATIVE_TARGETS, NativeTarget
from fuzz.target import CORPUS, Target
from fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent
SEED = 20250701
NATIVE_RUNS = 20_000
SAVED = [(target, path) for target in TARGETS.values() for path in target.saved()]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_target_takes_good_inputs_and_generated_ones(target: Target) -> None:
    for data in (b"", *target.seeds()):
        target.run(data)
    finding = explore(target, examples=target.examples, seed_number=SEED)
    if finding is not None:
        finding.error.add_note(f"fuzz target {target.name}, seed {SEED}, input {finding.data.hex()}")
        raise finding.error


@pytest.mark.parametrize(
    ("target", "path"), SAVED, ids=[path.relative_to(CORPUS).as_posix() for _target, path in SAVED]
)
def test_saved_input_finds_nothing_any_more(target: Target, path: Path) -> None:
    target.run(path.read_bytes())


def test_every_folder_of_the_corpus_belongs_to_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= {*TARGETS, *NATIVE_TARGETS}


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.parametrize("target", NATIVE_TARGETS.values(), ids=lambda target: target.name)
def test_compiled_harness_finds_nothing(target: NativeTarget, tmp_path: Path) -> None:
    harness = native.build(target, tmp_path)
    runs = NATIVE_RUNS // 20 if target.scribble else NATIVE_RUNS  # those start a thread, and look hundreds of times
    flags = [f"-runs={runs}", f"-seed={SEED}", f"-artifact_prefix={tmp_path}/", str(tmp_path / "grown"), *target.corpus]
    (tmp_path / "grown").mkdir()
    done = subprocess.run([*target.command(harness), *flags], capture_output=True, text=True, errors="replace")
    saved = [path.read_bytes().hex() for path in tmp_path.glob("*-*") if path.is_file()]
    assert done.returncode == 0, f"{target.name}, seed {SEED}, input {saved}:\n{done.stderr[-4000:]}"


def test_list_names_every_target() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "fuzz", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [*TARGETS, *NATIVE_TARGETS]
