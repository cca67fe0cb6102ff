"""A14: a locality above what the interface allows; physical presence claimed."""

from __future__ import annotations

import socket
import struct

import pytest

from spvtpm.embedded import VTPM
from spvtpm.engine.libtpms import Engine
from spvtpm.wire import crb
from spvtpm.wire.crb import LocCtrl, Register
from tests import tpm_commands as tpm
from tests.harness import RunningSp
from tests.throwaway import run_in_child

DRTM_PCR = 20
"""Resettable from locality 2 up. Source: TCG PC Client PTP 1.05, table "PCR attributes"."""


@pytest.mark.attack("A14")
def test_an_engine_that_is_told_locality_2_resets_the_drtm_pcr() -> None:
    def reset_at_locality_2() -> int:
        with Engine(lambda _permanent: None) as engine:
            engine.manufacture()
            tpm.checked(engine.process(tpm.startup()))
            engine.locality = 2
            return tpm.response_code(engine.process(tpm.pcr_reset(DRTM_PCR)))

    assert run_in_child(reset_at_locality_2) == tpm.RC_SUCCESS


@pytest.mark.attack("A14")
@pytest.mark.parametrize("loc_ctrl", [LocCtrl.SEIZE, LocCtrl.RESET_ESTABLISHMENT, 0xFFFFFFFF, 1 << 4])
def test_nothing_written_to_the_interface_gives_a_vm_more_than_locality_0(sp: RunningSp, loc_ctrl: int) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        crb.U32.pack_into(driver._memory, Register.LOC_CTRL, loc_ctrl)
        crb.U32.pack_into(driver._memory, Register.LOC_STATE, 0b10001010)

        assert tpm.base_code(driver.transmit(tpm.pcr_reset(DRTM_PCR))) == tpm.RC_LOCALITY


@pytest.mark.attack("A14")
def test_the_client_socket_refuses_every_locality_but_0(vtpm: VTPM) -> None:
    path = vtpm.tcti.removeprefix("swtpm:path=") + ".ctrl"
    answers = []
    for locality in range(5):
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(path)
            control.sendall(struct.pack(">IB", 5, locality))
            answers.append(struct.unpack(">I", control.recv(4))[0])

    assert answers == [0, 0x3D, 0x3D, 0x3D, 0x3D]
    assert tpm.base_code(vtpm.transmit(tpm.pcr_reset(DRTM_PCR))) == tpm.RC_LOCALITY


@pytest.mark.attack("A14")
def test_physical_presence_is_never_asserted(vtpm: VTPM) -> None:
    tpm_cc_clear = 0x126
    assert tpm.base_code(vtpm.transmit(tpm.pp_commands(tpm_cc_clear))) == tpm.RC_PP
