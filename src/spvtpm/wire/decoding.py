"""What decoders raise for bytes that mean nothing. Every parser of hostile bytes comes in."""

from __future__ import annotations

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""msgspec's own errors, and two that it lets through: text that is no UTF-8, and nesting without end."""
