"""Event logs: what tpm2-tools make of one, we make of it; and nothing hostile gets through."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire.errors import MessageError
from spvtpm.wire.event_log import MAX_EVENTS, MAX_LOG_BYTES, parse_event_log
from tests.attesting import log_event, log_head
from tests.clients.tools import Tools

SEPARATOR, NO_ACTION, ACTION, VERSION, VARIABLE, IPL, TAG = 4, 3, 0x80000007, 8, 0x80000001, 0xD, 6
BANKS = ("sha1", "sha256", "sha384")


def variable(name: str, value: bytes) -> bytes:
    return bytes(16) + struct.pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


def usual(banks: tuple[str, ...] = BANKS) -> bytes:
    """As a firmware boots."""
    return b"".join(
        [
            log_head(banks),
            log_event(0, VERSION, "2022.11\0".encode("utf-16-le"), banks),
            log_event(7, VARIABLE, variable("SecureBoot", b"\1"), banks),
            *(log_event(pcr, SEPARATOR, bytes(4), banks) for pcr in range(8)),
            log_event(5, ACTION, b"Exit Boot Services Invocation", banks),
            log_event(9, IPL, b"vmlinuz\0", banks, measured=b"the kernel"),
            log_event(9, TAG, struct.pack("<II", 0x8F3B22EC, 13) + b"Linux initrd\0", banks, measured=b"the initrd"),
        ]
    )


def test_tpm2_eventlog_replays_it_to_the_same_pcrs(tmp_path: Path) -> None:
    log = parse_event_log(usual())
    assert log.banks == BANKS
    tools = Tools("none", tmp_path)
    printed = tools.run("tpm2_eventlog", tools.write("log", usual())).decode().rpartition("\npcrs:")[2]
    theirs: dict[str, dict[int, bytes]] = {}
    bank = ""
    for line in printed.splitlines():
        key, _, value = line.partition(":")
        if value:
            theirs[bank][int(key)] = bytes.fromhex(value.strip().removeprefix("0x"))
        elif key.strip():
            bank = key.strip()
            theirs[bank] = {}
    assert log.replay() == theirs
    assert set(theirs["sha384"]) == {*range(8), 9}


def test_events_say_what_a_person_can_read_and_whether_it_was_measured() -> None:
    events = parse_event_log(usual()).events
    shown = {(event.pcr, event.kind_name, event.words, event.data_is_measured) for event in events}
    assert (0, "EV_S_CRTM_VERSION", "2022.11", True) in shown
    assert (7, "EV_EFI_VARIABLE_DRIVER_CONFIG", "SecureBoot", True) in shown
    assert (5, "EV_EFI_ACTION", "Exit Boot Services Invocation", True) in shown
    assert (9, "EV_IPL", "vmlinuz", False) in shown  # the kernel was measured, not its name
    assert (9, "EV_EVENT_TAG", "Linux initrd", False) in shown
    hostile = parse_event_log(log_head() + log_event(8, IPL, b"\x1b[2J") + log_event(8, 0x77, b"a" * 500)).events
    assert [(event.kind_name, len(event.words)) for event in hostile] == [("EV_IPL", 0), ("0x00000077", 56)]


def test_a_startup_locality_begins_pcr_0_and_what_is_no_action_extends_nothing() -> None:
    log = parse_event_log(log_head() + log_event(0, NO_ACTION, b"StartupLocality\0\3") + log_event(0, SEPARATOR, b"s"))
    begin = bytes(31) + b"\3"
    assert log.replay() == {"sha256": {0: hashlib.sha256(begin + hashlib.sha256(b"s").digest()).digest()}}
    assert not log.events[0].data_is_measured


def test_digests_of_a_kind_that_is_not_known_are_left_out() -> None:
    banks = ("sm3_256", "sha256")
    assert parse_event_log(usual(banks)).replay() == parse_event_log(usual(("sha256",))).replay()


@pytest.mark.parametrize(
    "log",
    [
        b"",
        log_event(0, SEPARATOR, b"s"),
        log_head().replace(b"Event03", b"Event02"),
        log_head(("sha256", "sha256")),
        log_head().replace(b"\x0b\0\x20\0", b"\x0b\0\x14\0"),
        log_head() + log_event(24, SEPARATOR, b"s"),
        log_head() + log_event(0, SEPARATOR, b"s", ("sha1",)),
        log_head() + log_event(0, SEPARATOR, b"s", ("sha256", "sha1")),
        log_head(("sha1", "sha256")) + log_event(0, SEPARATOR, b"s", ("sha1", "sha1")),
        log_head() + log_event(0, SEPARATOR, b"") * (MAX_EVENTS + 1),
        log_head() + log_event(0, SEPARATOR, bytes(MAX_LOG_BYTES)),
    ],
    ids=range(11),
)
def test_what_is_no_log_is_refused(log: bytes) -> None:
    with pytest.raises(MessageError):
        parse_event_log(log)


@pytest.mark.attack("A25")
def test_a_log_that_is_cut_off_inside_an_event_is_refused() -> None:
    log = usual(("sha256",))
    ends = {0}
    for size in range(len(log)):
        try:
            parse_event_log(log[:size])
        except MessageError:
            continue
        ends.add(size)
    assert len(ends) == 1 + len(parse_event_log(log).events)  # between events alone


@pytest.mark.attack("A25")
@given(st.binary(max_size=300), st.integers(0, len(usual())))
def test_hostile_bytes_make_a_log_or_a_typed_error(data: bytes, at: int) -> None:
    for hostile in (data, log_head() + data, usual()[:at] + data + usual()[at + len(data) :]):
        try:
            log = parse_event_log(hostile)
        except MessageError:
            continue
        log.replay()
        for event in log.events:
            assert event.words.isprintable()
            assert event.kind_name and event.data_is_measured in (True, False)
