"""A firmware's log of what it has measured into PCRs: read, replayed. Pure, hostile bytes.

A log proves nothing by itself. Where replaying it gives the PCRs that a TPM has quoted, its *digests* are what was measured, in
this order; what else an event says counts only if its digest is the digest of that.

Source: TCG PC Client Platform Firmware Profile 1.05, section 10 "Event Logging": 10.2.1 TCG_PCClientPCREvent, 10.2.2
TCG_PCR_EVENT2, 10.4.1 event types, 10.4.5.1 specification id event, 10.4.5.3 startup locality event.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import MessageError
from spvtpm.wire.tpm_structures import BANK_NAMES, DIGEST_BYTES, PCRS, PcrValues, Reader

MAX_LOG_BYTES: Final = 1 << 20
"""Firmware has some 64 KiB for it."""

MAX_EVENTS: Final = 4096

_NO_ACTION: Final = 0x00000003
_EVENT_TAG: Final = 0x00000006
_TAG_BYTES: Final = 8
"""What goes ahead of the data: the tag, and a length. Source: as above, section "TCG_PCClientTaggedEvent"."""

_SHA1_BYTES: Final = 20
_SIGNATURE, _LOCALITY = b"Spec ID Event03\0", b"StartupLocality\0"
_FIRST_OF_ONES, _LAST_OF_ONES = 17, 22
"""PCRs that are all ones after a reset. Source: TCG PC Client Platform TPM Profile, table "PCR Initial and Reset Values"."""

_MAX_WORDS: Final = 56

_EFI: Final = 0x80000000
_TYPES: Final = {
    0x00000000: "EV_PREBOOT_CERT",
    0x00000001: "EV_POST_CODE",
    _NO_ACTION: "EV_NO_ACTION",
    0x00000004: "EV_SEPARATOR",
    0x00000005: "EV_ACTION",
    _EVENT_TAG: "EV_EVENT_TAG",
    0x00000007: "EV_S_CRTM_CONTENTS",
    0x00000008: "EV_S_CRTM_VERSION",
    0x00000009: "EV_CPU_MICROCODE",
    0x0000000A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0000000B: "EV_TABLE_OF_DEVICES",
    0x0000000C: "EV_COMPACT_HASH",
    0x0000000D: "EV_IPL",
    0x00000012: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x00000013: "EV_POST_CODE2",
    _EFI | 0x1: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    _EFI | 0x2: "EV_EFI_VARIABLE_BOOT",
    _EFI | 0x3: "EV_EFI_BOOT_SERVICES_APPLICATION",
    _EFI | 0x4: "EV_EFI_BOOT_SERVICES_DRIVER",
    _EFI | 0x5: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    _EFI | 0x6: "EV_EFI_GPT_EVENT",
    _EFI | 0x7: "EV_EFI_ACTION",
    _EFI | 0x8: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    _EFI | 0x9: "EV_EFI_HANDOFF_TABLES",
    _EFI | 0xA: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    _EFI | 0xB: "EV_EFI_HANDOFF_TABLES2",
    _EFI | 0xC: "EV_EFI_VARIABLE_BOOT2",
    _EFI | 0x10: "EV_EFI_HCRTM_EVENT",
    _EFI | 0xE0: "EV_EFI_VARIABLE_AUTHORITY",
    _EFI | 0xE1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    _EFI | 0xE2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}
_VARIABLES: Final = frozenset({_EFI | 0x1, _EFI | 0x2, _EFI | 0xC, _EFI | 0xE0})


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was measured, as the log says.

    Attributes:
        pcr: into which PCR.
        kind: number of its type.
        digests: what the PCR of each bank was extended with.
        data: what the log says of it.
    """

    pcr: int
    kind: int
    digests: Mapping[str, bytes]
    data: bytes

    @property
    def kind_name(self) -> str:
        """The type's name in the specification."""
        return _TYPES.get(self.kind, f"{self.kind:#010x}")

    @property
    def is_extended(self) -> bool:
        """Whether it went into its PCR at all."""
        return self.kind != _NO_ACTION

    @property
    def data_is_measured(self) -> bool:
        """Whether the digests are of the data: then the data are as true as the digests."""
        matches = [hashlib.new(bank, self.data).digest() == digest for bank, digest in self.digests.items()]
        return self.is_extended and bool(matches) and all(matches)

    @property
    def words(self) -> str:
        """What a person may read in the data; empty: nothing. Fit for a screen."""
        data = self.data
        if self.kind in _VARIABLES:
            data = _variable_name(data)
        elif self.kind == _EVENT_TAG:
            data = data[_TAG_BYTES:]
        elif len(data) % 2 == 0 and data[1::2].strip(b"\0") == b"":
            data = data[::2]
        text = data.rstrip(b"\0").decode("ascii", "replace")
        if not text or not text.isprintable() or "\ufffd" in text:
            return ""
        return printable(text if len(text) <= _MAX_WORDS else text[: _MAX_WORDS - 1] + "…")


@dataclass(frozen=True, slots=True)
class EventLog:
    """A whole log.

    Attributes:
        banks: by name; those that are not known here are left out.
        events: in their order, also those that were not measured.
        locality: with which PCR 0 begins.
    """

    banks: tuple[str, ...]
    events: tuple[Event, ...]
    locality: int

    def replay(self) -> PcrValues:
        """The PCRs that come of it; those alone that an event has gone into."""
        values: PcrValues = {bank: {} for bank in self.banks}
        for event in self.events:
            for bank, digest in event.digests.items() if event.is_extended else ():
                before = values[bank].get(event.pcr, self._initial(bank, event.pcr))
                values[bank][event.pcr] = hashlib.new(bank, before + digest).digest()
        return values

    def _initial(self, bank: str, pcr: int) -> bytes:
        if _FIRST_OF_ONES <= pcr <= _LAST_OF_ONES:
            return b"\xff" * DIGEST_BYTES[bank]
        return (self.locality if pcr == 0 else 0).to_bytes(DIGEST_BYTES[bank], "big")


def parse_event_log(data: bytes) -> EventLog:
    """A crypto-agile log, as Linux has it in `binary_bios_measurements`.

    Raises:
        MessageError: it is malformed, too long, or of the old kind with SHA-1 alone.
    """
    if len(data) > MAX_LOG_BYTES:
        raise MessageError(f"an event log of more than {MAX_LOG_BYTES} bytes")
    reader = Reader(data, "the event log", "<")
    sizes = _read_specification(reader)
    events: list[Event] = []
    locality = 0
    while reader.left:
        event = _read_event(reader, sizes)
        if event.kind == _NO_ACTION and event.data.startswith(_LOCALITY) and len(event.data) == len(_LOCALITY) + 1:
            locality = event.data[-1]
        events.append(event)
        if len(events) > MAX_EVENTS:
            raise MessageError(f"an event log of more than {MAX_EVENTS} events")
    return EventLog(tuple(BANK_NAMES[kind] for kind in sizes if kind in BANK_NAMES), tuple(events), locality)


def _read_specification(reader: Reader) -> dict[int, int]:
    """The first event: the sizes of digests, by TPM_ALG_ID."""
    pcr, kind, _digest = reader.number("I"), reader.number("I"), reader.take(_SHA1_BYTES)
    content = Reader(reader.take(reader.number("I")), "the event log's first event", "<")
    if (pcr, kind) != (0, _NO_ACTION) or content.take(len(_SIGNATURE)) != _SIGNATURE:
        raise MessageError("the event log is not a crypto-agile one")
    content.take(4 + 4)  # platform class; minor and major version, errata, size of a number
    count = content.number("I")
    if not 1 <= count <= 16:  # more than there are TPM_ALG_IDs of hashes
        raise MessageError(f"the event log has digests of {count} kinds")
    sizes = {content.number("H"): content.number("H") for _ in range(count)}
    content.take(content.number("B"))
    content.finish()
    known = [(DIGEST_BYTES[BANK_NAMES[kind]], size) for kind, size in sizes.items() if kind in BANK_NAMES]
    if len(sizes) != count or any(right != size for right, size in known):
        raise MessageError("the event log has digests of an impossible kind")
    return sizes


def _read_event(reader: Reader, sizes: Mapping[int, int]) -> Event:
    pcr, kind, count = reader.number("I"), reader.number("I"), reader.number("I")
    if pcr >= PCRS:
        raise MessageError(f"the event log has an event of PCR {pcr}")
    if count != len(sizes):
        raise MessageError("the event log has an event that lacks a digest, or has too many")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = reader.number("H")
        if algorithm not in sizes or algorithm in digests:
            raise MessageError("the event log has an event with a digest of another kind")
        digests[algorithm] = reader.take(sizes[algorithm])
    known = {BANK_NAMES[algorithm]: digest for algorithm, digest in digests.items() if algorithm in BANK_NAMES}
    return Event(pcr, kind, known, reader.take(reader.number("I")))


def _variable_name(data: bytes) -> bytes:
    """Source: as above, section 10.2.6 "UEFI_VARIABLE_DATA": GUID, two lengths, the name in UTF-16."""
    try:
        reader = Reader(data, "a variable", "<")
        reader.take(16)
        characters = reader.number("Q")
        reader.number("Q")
        return reader.take(2 * characters)[::2]
    except MessageError:
        return b""
