"""A24: secrets in logs, error texts, core dumps, /proc, environment, command lines, and files. None may be found.

Each search is first tried on a process that does hold the secret openly, so that it is known to find what is there.
"""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from spvtpm.processor.fuses import Fuses
from spvtpm.processor.fuses.keepers import load_fuses
from spvtpm.wire.errors import SpvtpmError
from spvtpm.wire.messages import LaunchVm, ParkVtpm
from spvtpm.wire.owner_messages import Rotated, RotateUserSecret, encode_owner_message
from tests import tpm_commands as tpm
from tests.harness import RunningSp

MARKER = b"nv-content-of-the-guest-0123456789abcdef"


def forms_of(secret: bytes) -> list[bytes]:
    """The secret as it could show up: raw, hex, base64, Python repr."""
    hexed = secret.hex().encode()
    return [secret, hexed, hexed.upper(), base64.b64encode(secret).rstrip(b"="), repr(secret).encode()[2:-1]]


def contains(content: bytes, secret: bytes) -> bool:
    return any(form in content for form in forms_of(secret))


def secrets_in(fuses: Fuses) -> dict[str, bytes]:
    """What the chip holds."""
    return {
        "storage root key": fuses.storage_root_key,
        "SpSecret": fuses.sp_secret.value,
        "chip EK": fuses.endorsement.key.private_numbers().private_value.to_bytes(48, "big"),
    }


def open_to_others(pid: int) -> bytes:
    """What /proc tells of a process: command line, environment, and its memory where a process of the same user may look."""
    parts = []
    for name in ("cmdline", "environ", "status", "maps", "stack"):
        try:
            parts.append(Path(f"/proc/{pid}/{name}").read_bytes())
        except OSError:
            continue
    return b"\n".join(parts)


class UsedSp:
    """An SP that has done everything once, errors too, and what was secret while it did."""

    def __init__(self, sp: RunningSp) -> None:
        self.sp = sp
        fuses = load_fuses(sp.state / "fuses")
        self.vm_id = sp.launch()
        self.secrets = {
            **secrets_in(fuses),
            "VM key": sp.key(self.vm_id),
            "UserSecret": sp.owner.user_secret,
            "owner's key": sp.owner.key.private_numbers().private_value.to_bytes(48, "big"),
            "NV content": MARKER,
        }
        with sp.driver(self.vm_id) as driver:
            tpm.checked(driver.transmit(tpm.startup()))
            tpm.checked(driver.transmit(tpm.nv_define(0x01500001, len(MARKER))))
            tpm.checked(driver.transmit(tpm.nv_write(0x01500001, MARKER)))
            self.memory = bytes(driver._memory[:])
            sp.call(ParkVtpm(vm_id=self.vm_id))
            tpm.checked(driver.transmit(tpm.get_random(8)))
            self.memory += bytes(driver._memory[:])
        self.errors = b""
        with pytest.raises(SpvtpmError) as caught:
            sp.call(LaunchVm(vm_id=self.vm_id))
        self.errors += str(caught.value).encode()
        self.speak_as_owner()

    def speak_as_owner(self) -> None:
        """What an owner says, rightly and wrongly, with secrets in it."""
        again = self.sp.owner.provision(self.vm_id, self.secrets["VM key"])
        cut_off = encode_owner_message(again)[:-1]
        too_long = encode_owner_message(
            msgspec.structs.replace(again, vm_key=again.vm_key + b"!", user_secret=again.user_secret + b"!")
        )
        with self.sp.channel() as channel:
            channel.ask(RotateUserSecret(user_secret=self.sp.owner.user_secret), Rotated)
            for message in (encode_owner_message(again), cut_off, too_long):
                channel.channel.send(message)
                channel.send_frames(channel.channel.frames())
                with pytest.raises(SpvtpmError) as caught:
                    channel.hear()
                self.errors += str(caught.value).encode()


@pytest.fixture
def used(sp: RunningSp) -> Iterator[UsedSp]:
    yield UsedSp(sp)


@pytest.mark.attack("A24")
def test_the_search_finds_a_secret_that_is_there() -> None:
    secret = bytes(range(200, 232))
    program = "print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program, secret.hex()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()  # it runs: before, its command line may still be empty
        assert contains(open_to_others(child.pid), secret)
    finally:
        child.communicate(b"\n")


@pytest.mark.attack("A24")
def test_no_secret_is_in_logs_errors_command_lines_environments_or_vm_memory(used: UsedSp) -> None:
    places = {
        "the log": used.sp.log().encode(),
        "an error": used.errors,
        "the VM's memory as the hypervisor sees it": used.memory,
    }
    for pid in [used.sp.process.pid, *used.sp.workers()]:
        places[f"/proc/{pid}"] = open_to_others(pid)
    found = [
        (secret, place)
        for secret, value in used.secrets.items()
        for place, content in places.items()
        if contains(content, value)
    ]
    assert not found


@pytest.mark.attack("A24")
def test_no_secret_is_in_the_state_directory_but_in_the_files_that_are_made_for_it(used: UsedSp) -> None:
    used.sp.stop()
    allowed = {used.sp.state / "fuses" / "chip"}
    files = [path for path in used.sp.state.rglob("*") if path.is_file() and path not in allowed]
    found = [
        (secret, path.name)
        for secret, value in used.secrets.items()
        for path in files
        if contains(path.read_bytes(), value)
    ]
    assert files
    assert not found


@pytest.mark.attack("A24")
def test_the_secret_files_are_private(used: UsedSp) -> None:
    modes = {path.name: path.stat().st_mode & 0o077 for path in used.sp.state.rglob("*") if path.is_file()}
    private = {name: mode for name, mode in modes.items() if name != "sp.toml"}
    assert not any(private.values()), private
    assert used.sp.state.stat().st_mode & 0o077 == 0


@pytest.mark.attack("A24")
def test_no_process_of_the_sp_leaves_a_core_dump_or_can_be_read_by_its_own_user(used: UsedSp) -> None:
    for pid in [used.sp.process.pid, *used.sp.workers()]:
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        (core,) = (line.split() for line in limits if line.startswith("Max core file size"))
        assert core[4:6] == ["0", "0"], pid
    # Not dumpable: /proc belongs to root, so other processes of the same user cannot open its memory.
    with used.sp.driver(used.vm_id) as driver:
        tpm.checked(driver.transmit(tpm.get_random(8)))
        worker = used.sp.worker_of(driver.interface)
    assert Path(f"/proc/{worker}/mem").stat().st_uid == 0
    assert Path(f"/proc/{used.sp.process.pid}/mem").stat().st_uid == 0


@pytest.mark.attack("A24")
def test_secrets_do_not_show_in_the_repr_of_what_holds_them(used: UsedSp) -> None:
    fuses = load_fuses(used.sp.state / "fuses")
    shown = f"{fuses!r} {fuses.sp_secret!r} {fuses.endorsement!r}".encode()
    for name, secret in secrets_in(fuses).items():
        assert not contains(shown, secret), name
        assert contains(repr([secret]).encode(), secret), "the search works"
