"""PCR values that an owner shows to everybody who may see his VM at the platform: read by a command in the VM itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from spvtpm.wire.errors import MessageError
from spvtpm.wire.platform_api import PublishedPcrs

COMMAND: Final = ("tpm2_pcrread",)
"""What is run in the VM. Source: tpm2-tools, man 1 tpm2_pcrread: banks and PCRs as YAML."""

MAX_OUTPUT_BYTES: Final = 1 << 16

_BANK = re.compile(r"^ {2}([a-z0-9_]+):\s*$")
_PCR = re.compile(r"^ {4}(\d{1,2}) ?: 0x([0-9A-Fa-f]+)\s*$")


def read_pcrs(run: Callable[[Sequence[str]], tuple[int, bytes]], now: Callable[[], float] = time.time) -> PublishedPcrs:
    """The PCRs of a VM's vTPM.

    Args:
        run: runs a command in the VM; gives its exit code and what it wrote to stdout.
        now: the time, in seconds since 1970.

    Raises:
        MessageError: the command failed, or wrote something else.
    """
    code, output = run(COMMAND)
    if code:
        raise MessageError(f"{COMMAND[0]} in the VM ended with {code}")
    return parse_pcrs(output, now())


def parse_pcrs(output: bytes, read_s: float) -> PublishedPcrs:
    """What `tpm2_pcrread` wrote; hostile bytes.

    Raises:
        MessageError: it is something else.
    """
    banks: dict[str, dict[str, str]] = {}
    bank: dict[str, str] = {}
    for line in output[:MAX_OUTPUT_BYTES].decode("ascii", "replace").splitlines():
        if heading := _BANK.match(line):
            bank = banks.setdefault(heading[1], {})
        elif value := _PCR.match(line):
            bank[str(int(value[1]))] = value[2].lower()
    try:
        found = {name: values for name, values in banks.items() if values}
        pcrs = msgspec.convert({"banks": found, "read_s": read_s}, PublishedPcrs)
    except msgspec.ValidationError:
        pcrs = None
    if pcrs is None or not pcrs.banks:
        raise MessageError(f"{COMMAND[0]} in the VM has written something else than PCRs")
    return pcrs
