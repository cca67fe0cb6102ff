"""Where a vTPM lives."""

from __future__ import annotations

from enum import Enum


class Residency(Enum):
    """Where a vTPM lives now."""

    OFF = "off"
    ACTIVE = "active"
    PARKED = "parked"
    HALTED = "halted"
    FAILED = "failed"
