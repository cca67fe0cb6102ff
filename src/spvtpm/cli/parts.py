"""What command groups have in common: options, the call to the SP, JSON. The other modules of this door come in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
from cyclopts import Parameter

from spvtpm.wire import messages

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C. Source: POSIX.1-2008, Shell Command Language, section 2.8.2: 128 and more, for a signal."""

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for scripts.")]
Sp = Annotated[
    Path, Parameter(name="--sp", help="The secure processor: its state directory, or the socket run/sp.sock in it.")
]


def call_sp(sp: Path, request: messages.Request) -> messages.Reply:
    from spvtpm.hypervisor.sp_client import SecureProcessorClient

    with SecureProcessorClient(sp) as client:
        return client.call(request)


def print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode())
