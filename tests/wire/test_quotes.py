"""Quotes, keys and answers of TPMs as bytes: one of tpm2-tools' is read as they read it, and hostile ones end in typed errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire import attesting_commands as tpm
from spvtpm.wire.attestation_keys import parse_ak
from spvtpm.wire.attesting_commands import ENDORSEMENT
from spvtpm.wire.errors import InterfaceError, MessageError
from spvtpm.wire.platform_errors import EvidenceRefused
from spvtpm.wire.quotes import MAX_ATTEST_BYTES, parse_quote, verify_quote
from spvtpm.wire.tpm_structures import PcrSelection, Reader, read_pcr_selection

VECTOR = Path(__file__).parents[1] / "vectors" / "quote" / "tpm2-tools.txt"
SELECTION = PcrSelection((("sha256", (0, 16)), ("sha1", (2,))))
SAID = dict(line.split(": ", 1) for line in VECTOR.read_text().splitlines() if not line.startswith("#"))


def said(name: str) -> bytes:
    return bytes.fromhex(SAID[name])


def test_a_quote_of_tpm2_tools_says_what_they_say_of_it() -> None:
    ak = parse_ak(said("ak-public"))
    assert ak.name == said("ak-name")
    nonce = said("nonce")
    quote = verify_quote(said("attested"), said("signature"), ak, ENDORSEMENT, nonce, SELECTION)
    assert (quote.signer, quote.digest, quote.safe) == (said("signer"), said("digest"), True)
    assert [str(number) for number in (quote.clock_ms, quote.reset_count, quote.restart_count)] == [
        SAID[name] for name in ("clock", "resets", "restarts")
    ]
    extended = hashlib.sha256(bytes(32) + b"\xab" * 32).digest()
    assert quote.verify_values({"sha256": {0: bytes(32), 16: extended}, "sha1": {2: bytes(20)}})
    assert not quote.verify_values({"sha256": {0: bytes(32), 16: bytes(32)}, "sha1": {2: bytes(20)}})


@pytest.mark.parametrize(("at", "kind"), [(0, EvidenceRefused), (5, EvidenceRefused), (76, MessageError)])
def test_what_no_tpm_attests_what_is_no_quote_and_what_is_malformed_is_refused(at: int, kind: type[Exception]) -> None:
    changed = bytearray(said("attested"))
    changed[at] ^= 0x40
    with pytest.raises(kind):
        parse_quote(bytes(changed))


@pytest.mark.parametrize(
    "selection",
    ["00000005", "00000001000503010000", "00000001000b020100", "00000002000b03010000000b03010000", "00000001000b0301"],
    ids=["too many", "unknown bank", "short", "doubled", "cut off"],
)
def test_a_malformed_selection_is_refused(selection: str) -> None:
    with pytest.raises(MessageError):
        read_pcr_selection(Reader(bytes.fromhex(selection), "it"))


def test_a_quote_longer_than_any_is_not_looked_at() -> None:
    with pytest.raises(MessageError, match=str(MAX_ATTEST_BYTES)):
        parse_quote(bytes(MAX_ATTEST_BYTES + 1))


READERS: Final[Sequence[Callable[[Reader], object]]] = (
    tpm.created,
    tpm.started,
    tpm.activated,
    tpm.quoted,
    tpm.values_read,
)
GOOD = said("attested"), said("ak-public"), said("signature"), SELECTION.encode() + bytes(70)


def read_answer(read: Callable[[Reader], object], response: bytes) -> None:
    read(tpm.start_policy_session(bytes(32)).answer(response))


@pytest.mark.attack("A25")
@given(st.sampled_from(GOOD), st.integers(0, 200), st.binary(max_size=40))
def test_hostile_bytes_end_in_typed_errors(good: bytes, at: int, damage: bytes) -> None:
    data = good[:at] + damage + good[at + len(damage) :]
    ak = parse_ak(said("ak-public"))
    response = bytes.fromhex("8001") + (10 + len(data)).to_bytes(4, "big") + bytes(4) + data
    attempts: list[Callable[[], object]] = [
        lambda: parse_quote(data),
        lambda: parse_ak(data),
        lambda: ak.verify(data, said("attested")),
        lambda: tpm.start_policy_session(bytes(32)).answer(data),
        *(partial(read_answer, read, response) for read in READERS),
    ]
    for attempt in attempts:
        try:
            attempt()
        except (MessageError, EvidenceRefused, InterfaceError):
            continue
