"""The interface of `crb.py` as C definitions, for the compiled code at both ends. The package's build comes in, nobody else."""

from __future__ import annotations

import runpy
from enum import IntEnum, IntFlag
from pathlib import Path

_ENUMERATIONS = {"Register": "CRB", "LocState": "LOC_STATE", "LocCtrl": "LOC_CTRL", "LocSts": "LOC_STS"} | {
    "CtrlReq": "CTRL_REQ",
    "CtrlSts": "CTRL_STS",
    "AttachError": "ATTACH",
}
_NUMBERS = (
    *("MEMORY_BYTES", "DATA_BUFFER", "DATA_BUFFER_BYTES", "COMMAND_ADDRESS", "COMMAND_BYTES"),
    *("RESPONSE_ADDRESS", "ATTACH_ERROR_OFFSET", "ATTACH_NONCE_OFFSET"),
)


def c_definitions() -> str:
    """One `#define` for each register offset, bit, address and error: `CRB_CTRL_START`, `ATTACH_STORAGE`, …"""
    layout = runpy.run_path(str(Path(__file__).with_name("crb.py")))
    lines = []
    for name, prefix in _ENUMERATIONS.items():
        members: type[IntEnum | IntFlag] = layout[name]
        lines += [f"#define {prefix}_{member.name} {int(member)}u" for member in members]
    lines += [f"#define CRB_{name} {int(layout[name])}u" for name in _NUMBERS]
    return "\n".join(lines) + "\n"
