"""A27: another local user connects to the SP's sockets."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from spvtpm.embedded import VTPM
from spvtpm.guest.memory import InterfaceMemory
from spvtpm.hypervisor.sp_client import SecureProcessorClient
from spvtpm.wire import messages
from spvtpm.wire.errors import SpvtpmError
from tests import tpm_commands as tpm
from tests.emulator_client import CMD_GET_CAPABILITY, EmulatorClient
from tests.harness import RunningSp, is_root
from tests.throwaway import run_in_child

OTHER_USER = 65533

pytestmark = [
    pytest.mark.attack("A27"),
    pytest.mark.skipif(not is_root(), reason="only root can become another user"),
]


def as_other_user(attempt: object, user: int = OTHER_USER) -> str:
    """Runs `attempt` as another user; returns what stopped it, or "done"."""

    def become_and_try() -> str:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        try:
            attempt()  # type: ignore[operator]
        except (OSError, SpvtpmError) as error:
            return f"{type(error).__name__}: {error}"
        return "done"

    return run_in_child(become_and_try)


def open_the_way_to(path: Path) -> None:
    """Undoes the file permissions that protect a socket, as a careless administrator would."""
    path.chmod(0o777)
    for directory in path.parents:
        if directory == Path(directory.anchor):
            break
        directory.chmod(directory.stat().st_mode | 0o055)


def test_a_plain_tpm_socket_with_open_permissions_serves_another_user(vtpm: VTPM) -> None:
    path = Path(vtpm.tcti.removeprefix("swtpm:path="))
    open_the_way_to(path)

    def use() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(tpm.get_random(8))
            tpm.checked(connection.recv(4096))

    assert as_other_user(use) == "done"


def test_file_permissions_keep_another_user_from_every_socket(sp: RunningSp) -> None:
    vm_id = sp.launch()
    assert "Permission denied" in as_other_user(lambda: SecureProcessorClient(sp.socket))
    assert "Permission denied" in as_other_user(sp.channel)
    assert "Permission denied" in as_other_user(lambda: InterfaceMemory.connect(sp.interface(vm_id)))


def test_peer_credentials_refuse_another_user_even_where_permissions_are_open(sp: RunningSp) -> None:
    vm_id = sp.launch()
    for path in (sp.socket, sp.socket.with_name("channel.sock"), sp.interface(vm_id)):
        open_the_way_to(path)

    refused = as_other_user(lambda: SecureProcessorClient(sp.socket).call(messages.ListVms()))
    assert refused.startswith("PermissionRefused"), refused
    refused = as_other_user(sp.channel)
    assert refused.startswith("PermissionRefused"), refused
    refused = as_other_user(lambda: InterfaceMemory.connect(sp.interface(vm_id)))
    assert "refused this process" in refused
    assert f"uid {OTHER_USER}" in sp.log()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))


def test_nor_does_another_user_get_the_tpm_emulator_interface(sp: RunningSp) -> None:
    _vm_id, path = sp.launch_emulated()

    def attach() -> None:
        with EmulatorClient(path) as client:
            if not client.ask(struct.pack(">I", CMD_GET_CAPABILITY)):
                raise OSError("it hung up")

    assert "Permission denied" in as_other_user(attach)
    open_the_way_to(path)
    assert "it hung up" in as_other_user(attach)
    attach()


def test_a_user_who_is_allowed_may_connect_and_one_who_is_not_may_not(state_directory: Path) -> None:
    with RunningSp(state_directory, f"allowed_uids = [{os.geteuid()}, {OTHER_USER}]\n") as sp:
        state_directory.parent.chmod(0o711)  # the test's own directory
        vm_id = sp.launch()

        assert as_other_user(lambda: SecureProcessorClient(sp.socket).call(messages.ListVms())) == "done"
        assert as_other_user(lambda: sp.channel().close()) == "done"
        assert as_other_user(lambda: InterfaceMemory.connect(sp.interface(vm_id)).close()) == "done"
        for secret in ("fuses", "nv.db", "."):
            looked = as_other_user(lambda path=sp.state / secret: os.close(os.open(path, os.O_RDONLY)))
            assert "Permission denied" in looked, secret
        refused = as_other_user(lambda: SecureProcessorClient(sp.socket).call(messages.ListVms()), OTHER_USER - 1)
        assert refused.startswith("PermissionRefused"), refused
