"""Names of the NV records that belong to a vTPM."""

from __future__ import annotations

import uuid
from typing import Final

_VTPM_PREFIX = "vtpm/"
_HIBERNATED_PREFIX = "hibernated/"
_ENDORSEMENT_PREFIX = "endorsement/"

RECORD_PREFIXES: Final = (_VTPM_PREFIX, _HIBERNATED_PREFIX, _ENDORSEMENT_PREFIX)
"""Of all of them."""


def record_name(vtpm_id: uuid.UUID) -> str:
    """Of the vTPM's permanent state."""
    return f"{_VTPM_PREFIX}{vtpm_id}"


def hibernated_name(vtpm_id: uuid.UUID) -> str:
    """Of the volatile state of a vTPM whose VM is hibernated."""
    return f"{_HIBERNATED_PREFIX}{vtpm_id}"


def endorsement_name(vtpm_id: uuid.UUID) -> str:
    """Of the certificates of the vTPM's EKs (`VtpmEndorsement`)."""
    return f"{_ENDORSEMENT_PREFIX}{vtpm_id}"


def record_names(vtpm_id: uuid.UUID) -> tuple[str, ...]:
    """All that a vTPM can have."""
    return record_name(vtpm_id), hibernated_name(vtpm_id), endorsement_name(vtpm_id)
