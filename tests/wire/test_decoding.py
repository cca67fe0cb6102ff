"""Errors about hostile bytes quote little of them, and nothing that would act on a log or on a person's screen."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from spvtpm.processor.worker.messages import parse_from_worker
from spvtpm.wire.errors import MessageError
from spvtpm.wire.introductions import parse_clear
from spvtpm.wire.messages import parse_reply, parse_request

ESCAPE = "\x1b]0;title\x07\n2026-01-01 WARNING a line that nobody wrote\x9b2J"


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    ("parse", "head", "tag"),
    [
        (parse_clear, b"\x01", "Knock"),
        (parse_request, b"\x01", "GetStatus"),
        (parse_reply, b"\x01", "VmList"),
        (parse_from_worker, b"", "Off"),
    ],
)
@pytest.mark.parametrize("words", [ESCAPE, "long" * 10_000])
def test_a_field_that_nobody_knows_is_quoted_on_one_line_without_control_characters(
    parse: Callable[[bytes], object], head: bytes, tag: str, words: str
) -> None:
    for message in ({"type": tag, words: 1}, {"type": words}):
        with pytest.raises(MessageError) as refused:
            parse(head + msgspec.msgpack.encode(message))
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 400
