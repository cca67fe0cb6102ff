"""TPM commands in a guest's shell: what a test knows as bytes goes to /dev/tpm0, and comes back on the console."""

from __future__ import annotations

import re

SHELL = """
tpm() {  # NAME COMMAND: prints "NAME=response in hexadecimal;"
    exec 3<>/dev/tpm0
    printf "$2" >&3
    printf '%s=%s;\\n' "$1" "$(hexdump -v -e '1/1 "%02x"' <&3)"
    exec 3>&-
}
"""


def ask(name: str, command: bytes) -> str:
    """The shell command that sends a TPM command; its response is said under this name."""
    escaped = "".join(f"\\x{byte:02x}" for byte in command)
    return f"tpm {name} '{escaped}'\n"


def said(name: str) -> str:
    """The pattern of the response under this name."""
    return rf"\b{name}=([0-9a-f]+);"


def response(match: re.Match[str]) -> bytes:
    """The response that was matched."""
    return bytes.fromhex(match[1])
