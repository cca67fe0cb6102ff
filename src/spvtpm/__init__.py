"""spvtpm: virtual TPM 2.0s inside a secure processor.

import spvtpm

with spvtpm.VTPM() as tpm:
    response = tpm.transmit(bytes.fromhex("80010000000c0000017b0008"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spvtpm.embedded import VTPM as VTPM

__all__ = ["VTPM"]


def __getattr__(name: str) -> object:
    # Loaded on use: a process of one trust domain must not load all the others just by naming the package.
    if name == "VTPM":
        from spvtpm.embedded import VTPM

        return VTPM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
