"""The error tree: what crosses the wire as a code comes out as the same error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire import errors, platform_errors
from spvtpm.wire.errors import SpvtpmError, error_from_code

ALL = [
    value
    for name, value in sorted((vars(errors) | vars(platform_errors)).items())
    if isinstance(value, type) and issubclass(value, SpvtpmError)
]  # by looking into the modules, not by walking the tree as the code does


def test_no_two_errors_share_a_code() -> None:
    assert len({kind.code for kind in ALL}) == len(ALL)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_comes_back_from_its_code(kind: type[SpvtpmError]) -> None:
    error = error_from_code(kind.code, "a sentence")
    assert type(error) is kind
    assert str(error) == "a sentence"


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_a_hint_and_a_code_for_scripts(kind: type[SpvtpmError]) -> None:
    assert kind.hint.endswith(".")
    assert kind.code == kind.code.lower()
    assert kind.code.replace("-", "").isalpha()
    assert kind.__doc__


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not SpvtpmError])
def test_every_error_says_who_is_at_fault(kind: type[SpvtpmError]) -> None:
    assert sum(issubclass(kind, party) for party in (errors.PeerError, errors.PolicyError, errors.ResourceError)) == 1


@given(st.text().filter(lambda code: code not in {kind.code for kind in ALL}), st.text())
def test_an_unknown_code_gives_the_plain_error_that_quotes_it(code: str, message: str) -> None:
    error = error_from_code(code, message)
    assert type(error) is SpvtpmError
    assert str(error) == f"{code}: {message}"
