"""Register offsets and bits as the TCG PC Client PTP has them, and where frames may lie."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spvtpm.wire import crb
from spvtpm.wire.crb import Register, Registers

# Source: TCG PC Client PTP 1.05, table "Allocation of register space for CRB access"; typed in from there, not from our code.
PTP_OFFSETS = {
    "LOC_STATE": 0x00,
    "LOC_CTRL": 0x08,
    "LOC_STS": 0x0C,
    "INTF_ID": 0x30,
    "CTRL_EXT": 0x38,
    "CTRL_REQ": 0x40,
    "CTRL_STS": 0x44,
    "CTRL_CANCEL": 0x48,
    "CTRL_START": 0x4C,
    "INT_ENABLE": 0x50,
    "INT_STS": 0x54,
    "CTRL_CMD_SIZE": 0x58,
    "CTRL_CMD_LADDR": 0x5C,
    "CTRL_CMD_HADDR": 0x60,
    "CTRL_RSP_SIZE": 0x64,
    "CTRL_RSP_ADDR": 0x68,
}
PTP_DATA_BUFFER = 0x80

FIELD_OF_REGISTER = {
    Register.CTRL_CMD_SIZE: "cmd_size",
    Register.CTRL_CMD_LADDR: "cmd_laddr",
    Register.CTRL_CMD_HADDR: "cmd_haddr",
    Register.CTRL_RSP_SIZE: "rsp_size",
    Register.CTRL_RSP_ADDR: "rsp_addr",
}


@pytest.mark.claim("C9")
@pytest.mark.parametrize("name", PTP_OFFSETS)
def test_each_register_lies_where_the_ptp_puts_it(name: str) -> None:
    assert Register[name] == PTP_OFFSETS[name]


def test_registers_of_the_enumeration_and_of_the_ptp_are_the_same_ones() -> None:
    assert {register.name for register in Register} == {*PTP_OFFSETS, "INTF_ID_VENDOR"}  # upper half of INTF_ID
    assert crb.DATA_BUFFER == PTP_DATA_BUFFER


@pytest.mark.parametrize("register", Register)
def test_one_copy_reads_each_register_at_its_offset(register: Register) -> None:
    memory = bytearray(crb.REGISTERS.size)
    struct.pack_into("<I", memory, register, 0xC0FFEE01)

    registers = Registers._make(crb.REGISTERS.unpack(memory))

    field = FIELD_OF_REGISTER.get(register, register.name.lower())
    assert getattr(registers, field) == 0xC0FFEE01
    assert sum(value != 0 for value in registers) == 1


def test_the_registers_end_with_the_response_address() -> None:
    assert crb.REGISTERS.size == PTP_OFFSETS["CTRL_RSP_ADDR"] + 8


def test_control_registers_are_written_in_one_copy_at_their_place() -> None:
    memory = bytearray(0x80)
    crb.REQ_TO_START.pack_into(memory, Register.CTRL_REQ, 1, 2, 3, 4)
    assert [struct.unpack_from("<I", memory, offset)[0] for offset in (0x40, 0x44, 0x48, 0x4C)] == [1, 2, 3, 4]


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_the_command_address_is_put_together_from_its_halves(low: int, high: int) -> None:
    memory = bytearray(crb.REGISTERS.size)
    struct.pack_into("<II", memory, Register.CTRL_CMD_LADDR, low, high)
    assert Registers._make(crb.REGISTERS.unpack(memory)).cmd_addr == int.from_bytes(memory[0x5C:0x64], "little")


def test_interface_identifier_says_crb_and_nothing_that_is_not_there() -> None:
    def bits(first: int, last: int) -> int:
        return crb.INTF_ID_LOW >> first & (1 << last - first + 1) - 1

    # Source: PTP 1.05, table "Interface identifier".
    assert bits(0, 3) == 1, "InterfaceType: CRB is active"
    assert bits(4, 7) == 1, "InterfaceVersion: CRB version 1"
    assert bits(8, 8) == 0, "CapLocality: locality 0 only"
    assert bits(13, 13) == 0, "CapFIFO: none"
    assert bits(14, 14) == 1, "CapCRB"
    assert bits(17, 18) == 1, "InterfaceSelector: CRB"
    assert bits(19, 19) == 1, "IntfSelLock"
    assert bits(20, 23) == 0, "reserved"


def test_attach_fields_that_are_written_alone_lie_where_the_page_has_them() -> None:
    attach = crb.Attach(crb.ATTACH_MAGIC, 1, 0x01020304, b"v" * 16, b"b" * 16, b"n" * 32)
    page = bytes(crb.ATTACH_OFFSET) + crb.ATTACH.pack(*attach)
    assert struct.unpack_from("<I", page, crb.ATTACH_ERROR_OFFSET) == (0x01020304,)
    assert page[crb.ATTACH_NONCE_OFFSET :] == b"n" * 32
