"""The wheel: built from the sources alone, installed where nothing of the repository is, and used there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.claim("C18")

ROOT = Path(__file__).parent.parent
COMPILED = "abi3.so"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
NOT_SOURCES = shutil.ignore_patterns("*.so", "*.o", "_*.c", "*.egg-info", "__pycache__")

USE = """
import os, sys, spvtpm
from importlib.metadata import version
with spvtpm.VTPM() as tpm:
    response = tpm.transmit(bytes.fromhex("80010000000c0000017b0008"))
assert response[:12] == bytes.fromhex("800100000014000000000008"), response
with spvtpm.VTPM(sys.argv[1]) as tpm:
    assert tpm.transmit(bytes.fromhex("80010000000c0000017b0008"))[6:10] == bytes(4)
print(os.path.dirname(spvtpm.__file__), version("spvtpm"))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a program that must succeed, with next to no environment; returns what it printed."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: the repository stays as it is, and lends nothing that was compiled before."""
    copy = tmp_path_factory.mktemp("sources")
    shutil.copytree(ROOT / "src", copy / "src", ignore=NOT_SOURCES)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    built = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", built, ".", cwd=sources)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    """The names of all files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it, and this environment's site-packages behind it for the dependencies."""
    environment = tmp_path_factory.mktemp("elsewhere") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / "bin" / "python"
    run(
        *(*PIP, "--python", python, "install", "--no-index", "--no-deps", "--no-compile", wheel),
        cwd=environment.parent,
    )
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file is searched last, and .pth files there, an editable spvtpm among them, are not obeyed.
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(homes_of_the_dependencies())))
    return environment


def homes_of_the_dependencies() -> set[str]:
    """Where this environment has what the package needs to run, and pytest."""
    needed: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.split(r"[^\w-]", requirement)[0] for requirement in needed]
    return {str(distribution(name).locate_file("")) for name in (*names, "pytest")}


def matching(sources: Path, pattern: str) -> set[str]:
    return {path.relative_to(sources / "src").as_posix() for path in (sources / "src" / "spvtpm").rglob(pattern)}


def test_every_module_and_data_file_of_the_sources_is_in_the_wheel(sources: Path, files: set[str]) -> None:
    for pattern in ("*.py", "*.pyi", "*.toml", "py.typed", "*.html", "*.css", "*.js", "*.svg"):
        wanted = matching(sources, pattern)
        assert wanted, pattern
        assert wanted <= files, wanted - files


def test_every_compiled_module_is_in_the_wheel(sources: Path, files: set[str]) -> None:
    builders = [Path(name) for name in matching(sources, "*_build.py")]
    wanted = {f"{path.parent}/_{path.stem.removesuffix('_build')}.{COMPILED}" for path in builders}
    assert len(wanted) >= 2
    assert {name for name in files if name.endswith(".so")} == wanted


def test_neither_c_code_nor_tests_are_in_the_wheel(files: set[str]) -> None:
    ours = {name for name in files if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in ours} == {"spvtpm"}
    assert {Path(name).suffix for name in ours}.isdisjoint({".c", ".o", ".pyc"})
    assert not [name for name in files if Path(name).name.startswith(("test_", "conftest"))]


def test_the_license_comes_along(files: set[str]) -> None:
    assert [name for name in files if ".dist-info/" in name and name.endswith("LICENSE")]


def test_the_installed_package_runs_vtpms_far_from_the_repository(environment: Path, tmp_path: Path) -> None:
    said = run(environment / "bin" / "python", "-I", "-c", USE, tmp_path / "tpm", cwd=tmp_path)
    place, version = said.split()
    assert Path(place).is_relative_to(environment)
    assert not Path(place).is_relative_to(ROOT)
    assert version in (ROOT / "pyproject.toml").read_text()


def test_the_installed_command_makes_a_secure_processor(environment: Path, state_directory: Path) -> None:
    program, there = environment / "bin" / "spvtpm", state_directory.parent
    run(program, "vendor", "init", "vendor", "--name", "Example Silicon", cwd=there)
    run(program, "vendor", "manufacture", "vendor", "chip-1", cwd=there)
    said = run(program, "sp", "init", state_directory, "--chip", "chip-1", cwd=there)
    assert f"made in {state_directory}" in said
    assert (state_directory / "nv.db").exists()


def test_the_installed_package_brings_its_pytest_fixture(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "test_use.py").write_text(
        "def test_use(vtpm):\n    assert vtpm.transmit(bytes.fromhex('80010000000c0000017b0008'))[6:10] == bytes(4)\n"
    )
    said = run(environment / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert "1 passed" in said
