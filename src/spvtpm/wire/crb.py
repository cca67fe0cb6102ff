"""The Command Response Buffer interface: registers at the offsets of the TCG PC Client PTP, in memory shared by VM and SP.

One memory file per vTPM, mapped by the VM (as an ivshmem BAR or directly) and by the worker that runs the vTPM:

| offset | size | content |
| --- | --- | --- |
| 0x0000 | 0x80 | locality 0 registers |
| 0x0080 | 0xF80 | data buffer of the PTP; usable for frames |
| 0x1000 | 0x1000 | attach page: who this vTPM is bound to, in clear (`ATTACH`) |
| 0x2000 | 0x2000 | command frame, where CTRL_CMD_ADDR points after power-on |
| 0x4000 | 0x2000 | response frame, where CTRL_RSP_ADDR points after power-on |
| 0x6000 | 0x2000 | free for the VM to point the addresses at |

Addresses in CTRL_CMD_ADDR and CTRL_RSP_ADDR count from the start of this memory. Only locality 0 exists.

Source: TCG PC Client Platform TPM Profile Specification (PTP) 1.05, section 6.5.3, "Command Response Buffer interface".
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

MEMORY_BYTES = 0x8000
"""Size of the shared memory; a power of two, as a PCI BAR must be."""


class Register(IntEnum):
    """Byte offsets of the locality 0 registers. Source: PTP 1.05, table "CRB interface register space"."""

    LOC_STATE = 0x00
    LOC_CTRL = 0x08
    LOC_STS = 0x0C
    INTF_ID = 0x30
    INTF_ID_VENDOR = 0x34
    CTRL_EXT = 0x38
    CTRL_REQ = 0x40
    CTRL_STS = 0x44
    CTRL_CANCEL = 0x48
    CTRL_START = 0x4C
    INT_ENABLE = 0x50
    INT_STS = 0x54
    CTRL_CMD_SIZE = 0x58
    CTRL_CMD_LADDR = 0x5C
    CTRL_CMD_HADDR = 0x60
    CTRL_RSP_SIZE = 0x64
    CTRL_RSP_ADDR = 0x68


class LocState(IntFlag):
    """LOC_STATE. `tpmEstablished` is inverted in hardware: 1 means no dynamic launch has taken place."""

    TPM_ESTABLISHED = 1 << 0
    LOC_ASSIGNED = 1 << 1
    TPM_REG_VALID = 1 << 7


class LocCtrl(IntFlag):
    """LOC_CTRL, write-only; reads as 0 once the SP has taken the write."""

    REQUEST_ACCESS = 1 << 0
    RELINQUISH = 1 << 1
    SEIZE = 1 << 2
    RESET_ESTABLISHMENT = 1 << 3


class LocSts(IntFlag):
    """LOC_STS."""

    GRANTED = 1 << 0
    BEEN_SEIZED = 1 << 1


class CtrlReq(IntFlag):
    """CTRL_REQ; each bit reads as 0 once the SP has taken the write."""

    CMD_READY = 1 << 0
    GO_IDLE = 1 << 1


class CtrlSts(IntFlag):
    """CTRL_STS. `TPM_STS` set: the last command was not executed or not answered; the attach page says why."""

    TPM_STS = 1 << 0
    TPM_IDLE = 1 << 1


START = 1
CANCEL = 1

VENDOR_ID = 0x1AF4
"""INTF_ID vendor field; the PCI vendor under which ivshmem devices appear. Source: QEMU docs/specs/ivshmem-spec.rst."""

INTF_ID_LOW = (
    1  # interface type: CRB
    | 1 << 4  # interface version: CRB as of PTP 1.03
    | 0 << 8  # CapLocality: only locality 0
    | 1 << 9  # CapCRBIdleBypass: cmdReady from Command Completion leads to Ready
    | 0b11 << 11  # CapDataXferSizeSupport: 64 bytes
    | 1 << 14  # CapCRB
    | 1 << 17  # InterfaceSelector: CRB
    | 1 << 19  # IntfSelLock: the selection is fixed
)
"""Low 32 bits of INTF_ID. Source: PTP 1.05, table "CRB interface identifier register"."""

DATA_BUFFER = 0x80
DATA_BUFFER_BYTES = 0x1000 - DATA_BUFFER
COMMAND_ADDRESS = 0x2000
COMMAND_BYTES = 0x2000
RESPONSE_ADDRESS = 0x4000
RESPONSE_BYTES = 0x2000


class Registers(NamedTuple):
    """All registers of locality 0 as the memory holds them, read in one copy."""

    loc_state: int
    loc_ctrl: int
    loc_sts: int
    intf_id: int
    intf_id_vendor: int
    ctrl_ext: int
    ctrl_req: int
    ctrl_sts: int
    ctrl_cancel: int
    ctrl_start: int
    int_enable: int
    int_sts: int
    cmd_size: int
    cmd_laddr: int
    cmd_haddr: int
    rsp_size: int
    rsp_addr: int

    @property
    def cmd_addr(self) -> int:
        """CTRL_CMD_ADDR, 64 bits from its two halves."""
        return self.cmd_haddr << 32 | self.cmd_laddr


REGISTERS = struct.Struct("<I4xII32xIIQ" + "IIII" + "II" + "IIII" + "Q")
"""Layout of `Registers`, little-endian, from offset 0 to the end of CTRL_RSP_ADDR (0x70)."""

U32 = struct.Struct("<I")
REQ_TO_START = struct.Struct("<IIII")
"""CTRL_REQ, CTRL_STS, CTRL_CANCEL, CTRL_START: what changes with each command, written in one copy."""


class AttachError(IntEnum):
    """Why CTRL_STS.tpmSts is set; lies in the attach page. Says what the VM did wrong, and nothing secret."""

    NONE = 0
    BAD_ADDRESS = 1
    BAD_FRAME = 2
    NOT_AUTHENTIC = 3
    REPLAYED = 4
    RESPONSE_TOO_LONG = 5
    STORAGE = 6
    TPM_FAILED = 7
    POWERED_OFF = 8


class Attach(NamedTuple):
    """The attach page: what a VM must know before it can send its first frame. In clear; a change makes frames fail.

    Attributes:
        magic: `ATTACH_MAGIC`.
        layout_version: `LAYOUT_VERSION`.
        error: an `AttachError`.
        vm_id: 16 bytes, the VM the vTPM is bound to.
        boot_id: 16 bytes, new at every power-on of the vTPM.
        sp_nonce: 32 bytes, the SP's share of the next session's keys; new for every session.
    """

    magic: bytes
    layout_version: int
    error: int
    vm_id: bytes
    boot_id: bytes
    sp_nonce: bytes


ATTACH_OFFSET = 0x1000
ATTACH = struct.Struct("<8sII16s16s32s")
ATTACH_ERROR_OFFSET = ATTACH_OFFSET + 12
ATTACH_NONCE_OFFSET = ATTACH_OFFSET + 48
ATTACH_MAGIC = b"SPVTPM\x00\x01"
LAYOUT_VERSION = 1
