"""What decoders raise for bytes that mean nothing. Every parser of hostile bytes comes in."""

from __future__ import annotations

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""msgspec's own errors, and two that it lets through: text that is no UTF-8, and nesting without end."""

_MAX_WORDS = 256


def in_words(error: Exception) -> str:
    """What such an error says, fit for a log, a person's screen and a message.

    It quotes the bytes that it could not take, which are the other side's: they may be long, forge lines, or act on a screen.
    """
    return printable(str(error)[:_MAX_WORDS])


def printable(text: str) -> str:
    """Without anything that would act on a person's screen, or begin a line in a log."""
    return "".join(character if character.isprintable() else "�" for character in text)
