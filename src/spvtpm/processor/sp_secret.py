"""The chip's half of the key for exported instances, in one generation; older ones follow from it. For the SP alone."""

from __future__ import annotations

from dataclasses import dataclass

from spvtpm.wire.generations import FLEET_ID_BYTES, MAX_GENERATION, SECRET_BYTES, ladder_down


@dataclass(frozen=True, slots=True, repr=False)
class SpSecret:
    """The fleet's secret of one generation.

    Attributes:
        fleet_id: 16 bytes, public.
        generation: 1 to 1,024; public.
        value: 32 bytes, secret.
    """

    fleet_id: bytes
    generation: int
    value: bytes

    def __post_init__(self) -> None:
        if len(self.fleet_id) != FLEET_ID_BYTES or len(self.value) != SECRET_BYTES:
            raise ValueError("a fleet id has 16 bytes, an SpSecret 32")
        if not 1 <= self.generation <= MAX_GENERATION:
            raise ValueError(f"a generation is a number from 1 to {MAX_GENERATION}")

    def __repr__(self) -> str:
        return f"SpSecret(fleet_id={self.fleet_id.hex()}, generation={self.generation})"

    def at(self, generation: int) -> SpSecret:
        """The secret of this generation or of an older one.

        Raises:
            GenerationError: it is newer than this one, or there is none.
        """
        value = ladder_down(self.value, self.fleet_id, self.generation, generation)
        return SpSecret(self.fleet_id, generation, value)
