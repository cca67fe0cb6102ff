"""Where the chip's own secrets live, and its monotonic counter. One module for each place that can keep them.

`keepers.py` says which there are, and is where the rest of the secure processor asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from spvtpm.processor.sp_secret import SpSecret
from spvtpm.wire.certificate_building import Issuer
from spvtpm.wire.chip_file import Chip


class MonotonicCounter(Protocol):
    """A number that only grows, and that nobody outside the secure processor can set."""

    @property
    def pace_s(self) -> float:
        """How long to wait between two steps of no urgency, in seconds: counters wear, and some are slow."""

    def read(self) -> int:
        """The number; 0 on a new chip.

        Raises:
            FusesError: it cannot be read.
        """

    def increment(self) -> int:
        """Adds one, durably; gives the new number.

        Raises:
            FusesError: it may have been added, or not.
        """


@dataclass(frozen=True, slots=True, repr=False)
class Fuses:
    """What a chip holds.

    Attributes:
        chip_id: 16 bytes, public.
        storage_root_key: 32 bytes; every NV record is sealed under a key derived from it.
        sp_secret: the fleet's secret in the chip's generation.
        endorsement: the chip EK and its certificate; it certifies channel keys and the EKs of vTPMs, nothing else.
        certificates: DER: the chip EK's, the vendor's intermediate, the vendor's root; public.
        counter: against the whole NV store being put back to an older copy.
    """

    chip_id: bytes
    storage_root_key: bytes
    sp_secret: SpSecret
    endorsement: Issuer
    certificates: tuple[bytes, bytes, bytes]
    counter: MonotonicCounter

    @classmethod
    def of_chip(cls, chip: Chip, counter: MonotonicCounter) -> Self:
        """What a whole chip file holds, with a counter beside it."""
        secret = SpSecret(chip.fleet_id, chip.generation, chip.sp_secret)
        return cls(chip.chip_id, chip.storage_root_key, secret, chip.issuer(), chip.certificates, counter)

    def __repr__(self) -> str:
        return f"Fuses(chip_id={self.chip_id.hex()})"
