"""The rules of the house that no linter knows: sizes, names, and which packages are trust domains at all."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "spvtpm"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_MODULE = 400
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}
DOMAINS_WITHOUT_ENVIRONMENT = ("engine", "wire", "processor", "guest", "terminal")
UNTRUSTED = {"cloud", "hypervisor"}
REGISTRY_HOSTS = tuple(
    ".".join(labels)
    for labels in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("security", "ubuntu", "com"),
        ("pkg", "dev"),
    )
)
"""Where packages come from is the machine's business. Written in parts, or this file would name them."""


def from_root(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def contracts() -> dict[str, dict[str, Any]]:
    """The import contracts of pyproject.toml by their id."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {contract["id"]: contract for contract in project["tool"]["importlinter"]["contracts"]}


@cache
def layers() -> tuple[set[str], ...]:
    """Doors, domains, then what domains have in common."""
    return tuple(
        {name.strip(" ()") for name in re.split(r"[|:]", layer)}  # parentheses: still to come
        for layer in contracts()["layers"]["layers"]
    )


def tracked_files() -> list[Path]:
    """What git tracks or would track; without git (an unpacked source archive), all text that lies where ours does."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        ours = ("src", "tests", "fuzz", "models", "benchmarks", "docs", "requirements", "scripts", ".ci")
        paths = [path for folder in ours for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
        paths = [path for path in paths if path.suffix not in {".so", ".o", ".c", ".pyc"}]
    return [path for path in paths if path.is_file()]


def test_every_package_is_a_known_trust_domain() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    unknown = packages - set().union(*layers())
    assert not unknown, f"no import contract in pyproject.toml knows {sorted(unknown)}"


def test_every_domain_but_the_secure_processor_is_kept_from_the_engine() -> None:
    domains = {name for name in layers()[1] if (PACKAGE / name).is_dir()}
    assert set(contracts()["wire-alone"]["source_modules"]) == {f"spvtpm.{name}" for name in domains - {"processor"}}


def test_every_untrusted_domain_is_kept_from_cryptography() -> None:
    untrusted = {name for name in UNTRUSTED if (PACKAGE / name).is_dir()}
    assert set(contracts()["no-keys"]["source_modules"]) == {f"spvtpm.{name}" for name in untrusted}


def test_no_domain_imports_the_package_itself() -> None:
    """`spvtpm.VTPM` leads to a door, which import-linter is told not to hold against the package."""
    offences = []
    for domain in set().union(*layers()[1:]):
        for module in sorted((PACKAGE / domain).rglob("*.py")):
            for node in ast.walk(ast.parse(module.read_text())):
                if isinstance(node, ast.Import):
                    bad = any(alias.name == "spvtpm" for alias in node.names)
                else:
                    bad = isinstance(node, ast.ImportFrom) and (node.module == "spvtpm" or node.level > 0)
                if bad:
                    offences.append(from_root(module))
    assert not offences


@pytest.mark.parametrize("module", MODULES, ids=from_root)
def test_module_is_short_has_a_docstring_and_a_name_that_says_something(module: Path) -> None:
    text = module.read_text()
    assert len(text.splitlines()) <= LONGEST_MODULE, "it has become two rooms: divide it"
    assert ast.get_docstring(ast.parse(text)), "the first sentence says what room this is and who may come in"
    assert NAMES_THAT_SAY_NOTHING.isdisjoint(module.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("domain", DOMAINS_WITHOUT_ENVIRONMENT)
def test_trusted_code_reads_no_environment_variables(domain: str) -> None:
    readers = {"environ", "environb", "getenv", "getenvb"}
    offences = []
    for module in sorted((PACKAGE / domain).rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Attribute):
                names = {node.attr}
            elif isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
            else:
                continue
            if names & readers:
                offences.append(f"{from_root(module)}:{node.lineno}")
    assert not offences


def test_no_file_names_a_package_registry() -> None:
    hosts = re.compile("|".join(map(re.escape, REGISTRY_HOSTS)).encode(), re.IGNORECASE)
    offences = [
        f"{from_root(path)}:{number}"
        for path in tracked_files()
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if hosts.search(line)
    ]
    assert not offences


@pytest.mark.parametrize("file", sorted((ROOT / "requirements").glob("*.txt")), ids=from_root)
def test_every_requirement_is_pinned_by_version_and_hash(file: Path) -> None:
    statements = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", file.read_text())).splitlines()
    assert statements
    for statement in statements:
        assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:", statement), statement
