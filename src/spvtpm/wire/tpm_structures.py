"""Structures of the TPM specification: a reader that never leaves its bounds, hash algorithms by name. Pure, hostile bytes.

Source: TCG TPM 2.0 Library Part 2, table TPM_ALG_ID; sections "TPM2B types", "TPML_PCR_SELECTION", "TPMS_PCR_SELECTION".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from spvtpm.wire.errors import MessageError

BANKS: Final[dict[str, int]] = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}
"""Hash algorithms of PCR banks: TPM_ALG_ID by name, as hashlib and tpm2-tools have it."""

BANK_NAMES: Final = {algorithm: name for name, algorithm in BANKS.items()}

DIGEST_BYTES: Final = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}

PCRS: Final = 24
"""Source: TCG PC Client Platform TPM Profile, section "PCR Requirements"."""

_SELECT_BYTES: Final = PCRS // 8

PcrValues = dict[str, dict[int, bytes]]
"""For each bank, by name, values by index."""


def sized(content: bytes) -> bytes:
    """A TPM2B: the content after its 16-bit length."""
    return struct.pack(">H", len(content)) + content


class Reader:
    """Reads one structure after the other.

    Args:
        data: hostile bytes.
        what: whose they are, for sentences.
        byte_order: `>` as TPMs have it, `<` as event logs do.
    """

    def __init__(self, data: bytes, what: str, byte_order: str = ">") -> None:
        self._data = data
        self._what = what
        self._order = byte_order
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def take(self, size_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            MessageError: there are fewer.
        """
        if size_bytes > self.left:
            raise MessageError(f"{self._what} ends too early")
        self._at += size_bytes
        return self._data[self._at - size_bytes : self._at]

    def number(self, form: str) -> int:
        """The next number: `B`, `H`, `I` or `Q`, as `struct` has them.

        Raises:
            MessageError: as of `take`.
        """
        code = self._order + form
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def sized(self, bound: int) -> bytes:
        """The content of a TPM2B.

        Args:
            bound: how many bytes it may have.

        Raises:
            MessageError: it has more, or fewer than it says.
        """
        size = self.number("H")
        if size > bound:
            raise MessageError(f"{self._what} has a part of {size} bytes; allowed are {bound}")
        return self.take(size)

    def finish(self) -> None:
        """There must be nothing more.

        Raises:
            MessageError: there is.
        """
        if self.left:
            raise MessageError(f"{self._what} goes on behind its end")


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """Which PCRs of which banks.

    Attributes:
        banks: for each bank, its name and the indices in ascending order; banks in the order in which a TPM is asked.
    """

    banks: tuple[tuple[str, tuple[int, ...]], ...]

    def encode(self) -> bytes:
        """TPML_PCR_SELECTION."""
        parts = [struct.pack(">I", len(self.banks))]
        for bank, indices in self.banks:
            bits = sum(1 << index for index in indices)
            parts.append(struct.pack(">HB", BANKS[bank], _SELECT_BYTES) + bits.to_bytes(_SELECT_BYTES, "little"))
        return b"".join(parts)

    def values(self, pcrs: Mapping[str, Mapping[int, bytes]]) -> bytes:
        """The values one after the other, as TPM2_Quote hashes them. Source: as above, Part 3, section "TPM2_Quote"."""
        return b"".join(pcrs[bank][index] for bank, indices in self.banks for index in indices)


def read_pcr_selection(reader: Reader) -> PcrSelection:
    """The next TPML_PCR_SELECTION.

    Raises:
        MessageError: it is malformed, or names banks that nobody knows here, or one of them twice.
    """
    count = reader.number("I")
    if count > len(BANKS):
        raise MessageError(f"a selection of PCRs in {count} banks; there are {len(BANKS)}")
    banks = []
    for _ in range(count):
        bank = BANK_NAMES.get(reader.number("H"))
        if bank is None:
            raise MessageError("a selection of PCRs in a bank that is not known here")
        if reader.number("B") != _SELECT_BYTES:
            raise MessageError(f"a selection of PCRs that is not {_SELECT_BYTES} bytes long")
        bits = int.from_bytes(reader.take(_SELECT_BYTES), "little")
        banks.append((bank, tuple(index for index in range(PCRS) if bits >> index & 1)))
    if len({bank for bank, _ in banks}) != count:
        raise MessageError("a selection of PCRs that names a bank twice")
    return PcrSelection(tuple(banks))
