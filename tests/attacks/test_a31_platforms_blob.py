"""A31: the platform's own state on the TPM emulator interface: brought in, or taken out to be brought in elsewhere, or later."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests import emulator_client as swtpm
from tests import tpm_commands as tpm
from tests.emulator_client import EmulatorClient
from tests.harness import RunningSp
from tests.swtpm_process import RunningSwtpm, needs_swtpm

pytestmark = pytest.mark.attack("A31")

_PERMANENT, _VOLATILE = 1, 2
_INDEX = 0x1500001
_PLAIN, _ENCRYPTED = 0, 2


def taken_out(client: EmulatorClient, kind: int) -> bytes:
    """A state as GET_STATEBLOB gives it, if it does."""
    answer = client.ask(struct.pack(">IIII", swtpm.CMD_GET_STATEBLOB, 0, kind, 0))
    result, _flags, total, _length = struct.unpack_from(">IIII", answer)
    while len(answer) < 16 + total:
        answer += client.control.recv(1 << 16)
    return answer[16:] if result == swtpm.TPM_SUCCESS else b""


def bring_in(client: EmulatorClient, state: bytes, kind: int, flags: int = _PLAIN) -> int:
    """The result of SET_STATEBLOB, sent as QEMU sends it."""
    return client.do(swtpm.CMD_SET_STATEBLOB, struct.pack(">III", flags, kind, len(state)) + state)


@needs_swtpm
def test_swtpm_gives_its_state_out_in_clear_and_takes_an_older_one_back(tmp_path: Path) -> None:
    with RunningSwtpm(tmp_path) as path, EmulatorClient(path) as client:
        client.attach()
        tpm.checked(client.transmit(tpm.startup()))
        older = taken_out(client, _PERMANENT)
        tpm.checked(client.transmit(tpm.nv_define(_INDEX, 6)))
        tpm.checked(client.transmit(tpm.nv_write(_INDEX, b"secret")))
        assert b"secret" in taken_out(client, _PERMANENT)

        assert client.do(swtpm.CMD_STOP) == bring_in(client, older, _PERMANENT) == client.init() == swtpm.TPM_SUCCESS
        tpm.checked(client.transmit(tpm.startup()))
        assert tpm.response_code(client.transmit(tpm.nv_read(_INDEX, 6))) != tpm.RC_SUCCESS, "it is rolled back"


@pytest.mark.parametrize("kind", [_PERMANENT, _VOLATILE, 3])
@pytest.mark.parametrize("is_on", [True, False])
def test_no_state_comes_out(sp: RunningSp, kind: int, is_on: bool) -> None:
    with EmulatorClient(sp.launch_emulated()[1]) as client:
        client.attach()
        if not is_on:
            client.do(swtpm.CMD_STOP)
        assert taken_out(client, kind) == b""
        assert client.do(swtpm.CMD_STORE_VOLATILE) == swtpm.TPM_BAD_ORDINAL


@pytest.mark.parametrize("flags", [_PLAIN, _ENCRYPTED])
@pytest.mark.parametrize("kind", [_PERMANENT, _VOLATILE, 3])
def test_no_state_goes_in_and_the_tpm_is_as_it_was(sp: RunningSp, kind: int, flags: int) -> None:
    _vm_id, path = sp.launch_emulated()
    with EmulatorClient(path) as client:
        client.attach()
        tpm.checked(client.transmit(tpm.startup()))
        tpm.checked(client.transmit(tpm.nv_define(_INDEX, 4)))
        tpm.checked(client.transmit(tpm.nv_write(_INDEX, b"kept")))
        client.do(swtpm.CMD_STOP)
        assert bring_in(client, b"state" * 500, kind, flags) == swtpm.TPM_BAD_ORDINAL
        assert client.ask(bytes(4)) == b"", "what follows could be a state, not a request"
    with EmulatorClient(path) as client:
        client.attach()
        tpm.checked(client.transmit(tpm.startup()))
        assert tpm.nv_content_in(client.transmit(tpm.nv_read(_INDEX, 4))) == b"kept"
