"""The pytest fixture `vtpm`: a TPM 2.0 of its own for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from spvtpm.embedded import VTPM


@pytest.fixture
def vtpm() -> Iterator[VTPM]:
    """A fresh vTPM in memory, powered on and started; gone after the test."""
    # Imported on use: this plugin is loaded into every pytest run of its environment.
    from spvtpm.embedded import VTPM

    with VTPM() as tpm:
        yield tpm
