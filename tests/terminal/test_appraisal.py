"""What an owner thinks of PCRs: his policy, and the firmware's log."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.terminal.appraisal import DEFAULT_PCRS, appraise, parse_policy, parse_selection, selection_of
from spvtpm.wire.errors import UsageError
from spvtpm.wire.event_log import parse_event_log
from spvtpm.wire.tpm_structures import PcrValues
from tests.attesting import FEW, log_event, log_head

ZERO, ONE = bytes(32), b"\1" * 32
SEPARATOR = 4


def policy(value: object) -> bytes:
    return json.dumps({"pcrs": value}).encode()


def test_pcrs_are_said_as_tpm2_tools_have_them() -> None:
    assert parse_selection("sha256:16,7,0") == FEW
    assert FEW.encode().hex() == "00000001000b03810001"
    assert parse_selection("sha256:1+sha1:0").banks == (("sha1", (0,)), ("sha256", (1,)))


@pytest.mark.parametrize(
    "text", ["", "sha256", "sha256:", "md5:0", "sha256:24", "sha256:-1", "sha256:all", "sha256:²", "0"]
)
def test_what_names_no_pcrs_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_selection(text)


def test_all_that_is_expected_is_quoted() -> None:
    expected = parse_policy(policy({"sha256": {"16": ZERO.hex(), "0": ONE.hex()}}))
    assert selection_of(None, expected).banks == (("sha256", (0, 16)),)
    assert selection_of("sha256:7", expected) == FEW
    assert selection_of(None, None) == parse_selection(DEFAULT_PCRS)


def test_each_value_of_a_policy_will_do_and_no_other() -> None:
    expected = parse_policy(policy({"sha256": {"0": [ZERO.hex(), ONE.hex().upper()]}}))
    for value, verdict in ((ZERO, "trusted"), (ONE, "trusted"), (b"\2" * 32, "refused")):
        assert appraise({"sha256": {0: value}}, expected, None).verdict == verdict
    assert appraise({"sha256": {0: ZERO}}, None, None).verdict == "genuine"


def test_a_log_has_to_give_every_pcr_that_it_speaks_of() -> None:
    log = parse_event_log(log_head() + log_event(0, SEPARATOR, b"a") + log_event(1, SEPARATOR, b"b"))
    value = {pcr: hashlib.sha256(ZERO + hashlib.sha256(data).digest()).digest() for pcr, data in ((0, b"a"), (1, b"b"))}
    right: PcrValues = {"sha256": {**value, 7: ONE}}
    judged = appraise(right, None, log)
    assert (judged.verdict, [pcr.is_logged for pcr in judged.pcrs]) == ("genuine", [True, True, None])
    wrong: PcrValues = {"sha256": {0: value[0], 1: ONE}}
    assert appraise(wrong, None, log).reasons == ["PCR 1 of sha256 is not what the event log gives"]
    assert appraise({"sha256": {7: ONE}}, None, log).verdict == "refused"  # it says nothing of what was quoted


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"{}",
        b'{"pcrs":{}}',
        policy({"sha256": {}}),
        policy({"md5": {"0": "00" * 16}}),
        policy({"sha256": {"24": ZERO.hex()}}),
        policy({"sha256": {"0": []}}),
        policy({"sha256": {"0": "00" * 20}}),
        policy({"sha256": {"0": "0g" * 32}}),
        b'{"pcrs":{"sha256":{"0":"' + ZERO.hex().encode() + b'"}},"more":1}',
    ],
    ids=range(10),
)
def test_what_is_no_policy_is_refused(file: bytes) -> None:
    with pytest.raises(UsageError):
        parse_policy(file)


@given(st.binary(max_size=200))
def test_a_policy_of_any_bytes_is_one_or_a_typed_error(data: bytes) -> None:
    try:
        parse_policy(data)
    except UsageError:
        return
