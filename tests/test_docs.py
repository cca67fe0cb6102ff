"""The documentation does not lie: what it links to, names or lists exists, and what exists and matters to users is in it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from spvtpm.processor.config import DEFAULT_TOML, SpConfig
from spvtpm.terminal import whereabouts
from spvtpm.wire import crb, introductions, messages, owner_messages, platform_errors
from spvtpm.wire.errors import SpvtpmError

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGES_THAT_NAME_TESTS = ("SPECIFICATION.md", "docs/claims.md", "docs/threats.md")

_CODE_BLOCK = re.compile(r"(?m)^(?: {4,}.*|```(?:.|\n)*?^```.*)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"(?m)^#{1,6} +(.+?) *$")
_NAMED_TEST = re.compile(r"tests/[\w/]+\.py(?:::(\w+))?")
_BENCHMARK = re.compile(r"`make bench`: \"([^\"]+)\"")


def from_root(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _prose(page: Path) -> str:
    """The page without its code blocks."""
    return _CODE_BLOCK.sub("", page.read_text())


@cache
def _anchors(page: Path) -> set[str]:
    """As the usual renderers make them: lower case, punctuation gone, blanks to hyphens."""
    headings = _HEADING.findall(_prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def _functions(test_file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(test_file.read_text())) if isinstance(node, ast.FunctionDef)}


@cache
def _marked(kind: str) -> dict[str, set[str]]:
    """Ids given to `pytest.mark.<kind>` anywhere in the tests, with the files that do; in a loop over literals too."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            loops = node.generators if isinstance(node, ast.GeneratorExp) else []
            identities = [identity for loop in loops for identity in _values(loop.iter)]
            for mark in ast.walk(node.elt) if isinstance(node, ast.GeneratorExp) else [node]:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == f"pytest.mark.{kind}":
                    for identity in _values(mark.args[0]) or identities:
                        found.setdefault(identity, set()).add(from_root(file))
    return found


def _values(expression: ast.expr) -> list[str]:
    """Of a literal or a tuple of literals; none of anything else."""
    elements = expression.elts if isinstance(expression, ast.Tuple) else [expression]
    return [str(element.value) for element in elements if isinstance(element, ast.Constant)]


@pytest.mark.parametrize("page", PAGES, ids=from_root)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in _anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=from_root)
def test_a_page_begins_with_its_title_and_a_sentence(page: Path) -> None:
    title, blank, sentence = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert not blank
    assert sentence and (sentence[0] != "#" or page.name == "CONTRIBUTING.md")


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in _LINK.findall(index.read_text())}
    assert [from_root(page) for page in PAGES if page not in linked and page != index] == []


@pytest.mark.parametrize("page", PAGES_THAT_NAME_TESTS)
def test_every_test_that_is_named_exists(page: str) -> None:
    named = list(_NAMED_TEST.finditer((ROOT / page).read_text()))
    assert named
    for match in named:
        file = ROOT / match[0].partition("::")[0]
        assert file.is_file(), match[0]
        assert match[1] is None or match[1] in _functions(file), match[0]


def test_every_benchmark_that_is_named_exists() -> None:
    sources = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    named = _BENCHMARK.findall((ROOT / "SPECIFICATION.md").read_text())
    assert named
    assert [row for row in named if row not in sources] == []


@pytest.mark.parametrize(("kind", "page"), [("claim", "docs/claims.md"), ("attack", "docs/threats.md")])
def test_every_claim_and_attack_that_a_test_names_has_its_row(kind: str, page: str) -> None:
    rows = set(re.findall(r"(?m)^\| ([ABC]\d+[a-c]?) \|", (ROOT / page).read_text()))
    assert _marked(kind)
    assert {identity: files for identity, files in _marked(kind).items() if identity not in rows} == {}


def _errors(kind: type[SpvtpmError]) -> list[type[SpvtpmError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _errors(child))]


def _table_keys(page: str) -> set[str]:
    """What stands in backquotes in the first column of any table."""
    cells = re.findall(r"(?m)^\| ([^|]*) \|", (ROOT / page).read_text())
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def test_every_error_code_is_explained() -> None:
    assert issubclass(platform_errors.NoHost, SpvtpmError)  # a module of the tree, too
    codes = {kind.code for kind in _errors(SpvtpmError) if kind.__module__.startswith("spvtpm.")}
    assert codes - _table_keys("docs/how-to/troubleshooting.md") == set()


def test_every_configuration_key_is_explained_with_its_default() -> None:
    page = (ROOT / "docs/how-to/run-a-secure-processor.md").read_text()
    for field in msgspec.structs.fields(SpConfig):
        row = re.search(rf"(?m)^\| `{field.name}` \| ([^|]+) \|", page)
        assert row, field.name
        assert field.name in DEFAULT_TOML
        if field.default is not msgspec.NODEFAULT:
            assert row[1] == str(field.default), field.name


@pytest.mark.parametrize("union", [messages.Request, messages.Reply], ids=["requests", "replies"])
def test_every_message_of_the_hypervisors_port_is_specified(union: object) -> None:
    page = (ROOT / "docs/formats/hypervisor-messages.md").read_text()
    for message in get_args(union):
        assert re.search(rf"(?m)^(\| `{message.__name__}` \||### {message.__name__}$)", page), message.__name__
        for field in msgspec.structs.fields(message):
            assert f"`{field.name}`" in page, f"{message.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("union", "page"),
    [
        (owner_messages.OwnerRequest, "owner-messages.md"),
        (owner_messages.OwnerReply, "owner-messages.md"),
        (introductions.ClearMessage, "channel.md"),
        (whereabouts.Place, "keyring.md"),
    ],
    ids=["requests", "replies", "introductions", "places"],
)
def test_every_message_of_an_owner_and_every_place_of_a_vtpm_is_specified(union: object, page: str) -> None:
    text = (ROOT / "docs/formats" / page).read_text()
    for message in get_args(union):
        tag = message.__struct_config__.tag
        assert re.search(rf"(?m)^\| `{tag}` \|", text), tag
        for field in msgspec.structs.fields(message):
            assert f"`{field.name}`" in text, f"{tag}.{field.name}"


def test_every_register_and_every_reason_for_a_refusal_is_specified() -> None:
    page = (ROOT / "docs/formats/crb-memory.md").read_text()
    for register in crb.Register:
        assert re.search(rf"(?m)^\| 0x{register:02X} \| ", page), register.name
    for error in crb.AttachError:
        assert f"| {error.value} | {error.name} |" in page
