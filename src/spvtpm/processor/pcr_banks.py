"""The PCR banks that a vTPM can have, by the names that TPM tools give them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from spvtpm.wire.errors import PcrBankUnknown

PCR_BANKS: Final = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}
"""Each name and its hash algorithm. Source: TCG TPM 2.0 Library Part 2, table TPM_ALG_ID; libtpms, TpmProfile.h, ALG_*."""


def check_pcr_banks(names: Collection[str]) -> None:
    """Whether a vTPM can have these banks.

    Raises:
        PcrBankUnknown: one of them it cannot.
    """
    for name in sorted(names):
        if name not in PCR_BANKS:
            raise PcrBankUnknown(f"a vTPM has no PCR bank {name!r}; it can have {', '.join(PCR_BANKS)}")
