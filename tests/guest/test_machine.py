"""The emulated VM as a process: boots with the key from its secure processor, sleeps as ciphertext, leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.wire.errors import MessageError, SpvtpmError, WrongState
from spvtpm.wire.framing import encode_frame
from spvtpm.wire.machine_control import MAX_CONTROL_BYTES, AwaitReady, encode_control
from spvtpm.wire.messages import HibernateVm, LaunchVm, ResetVm, StopVm
from tests.guest.running_machine import PATIENCE_S, RunningMachine, ended
from tests.harness import RunningSp

PCR = "tpm2_pcrread -Q -o /dev/stdout sha256:16 | od -An -tx1"


@pytest.fixture
def new(sp: RunningSp) -> Iterator[RunningMachine]:
    """A VM that has not been launched."""
    with RunningMachine(sp) as machine:
        yield machine


def user_reaches_the_program() -> bool:
    """Whether another user than root can run the package."""
    command = [sys.executable, "-c", "import spvtpm.guest"]
    try:
        return (
            subprocess.run(
                command, user=200_001, group=200_001, extra_groups=[], cwd="/", capture_output=True
            ).returncode
            == 0
        )
    except PermissionError:
        return False


def left_behind(machine: RunningMachine) -> list[int]:
    """Programs that have made sessions and groups of their own, and whose parents have ended."""
    script = (
        "for i in 1 2 3; do setsid sh -c 'sleep 1000 & echo $!; echo $$; wait' >>pids 2>/dev/null </dev/null & done; "
    )
    script += "while [ $(wc -l <pids) -lt 6 ]; do :; done; cat pids"
    return [int(pid) for pid in machine.shell(script).split()]


def test_programs_in_the_vm_reach_its_vtpm(machine: RunningMachine) -> None:
    assert machine.state() == "running"
    assert len(machine.shell("tpm2_getrandom 16")) == 16


def test_a_vm_without_a_vtpm_runs_programs(sp: RunningSp) -> None:
    with RunningMachine(sp, with_vtpm=False) as machine:
        machine.begin()
        assert machine.shell("env | grep TPM; pwd") == f"{machine.memory}\n".encode()
        machine.suspend()
        machine.go_on()
        machine.power_off()


def test_power_off_leaves_nothing_behind(machine: RunningMachine) -> None:
    pids = left_behind(machine)
    machine.shell("echo secret > note")
    machine.power_off()
    assert ended(pids)
    assert list(machine.directory.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_powers_it_off_in_order(machine: RunningMachine, number: int) -> None:
    pids = left_behind(machine)
    os.kill(machine.pid, number)
    assert machine.wait() == 0
    assert ended(pids)
    assert list(machine.directory.iterdir()) == []


def test_power_off_ends_a_command_under_way_and_its_owner_hears_of_it(machine: RunningMachine) -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(machine.run("sh", "-c", "touch here; exec sleep 1000")[0]))
    thread.start()
    while not (machine.memory / "here").exists():
        assert thread.is_alive()
    machine.power_off()
    thread.join(PATIENCE_S)
    assert codes == [128 + signal.SIGTERM]


def test_what_commands_leave_behind_runs_on_and_is_buried_when_it_ends(machine: RunningMachine) -> None:
    pids = left_behind(machine)
    for pid in reversed(pids):  # a shell before what it waits for, and would end with
        os.kill(pid, signal.SIGKILL)
    assert ended(pids)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):  # until it is buried
        assert machine.state() == "running"


def test_a_hibernated_vm_goes_on_with_its_memory_and_its_pcrs(machine: RunningMachine) -> None:
    machine.shell("tpm2_pcrextend 16:sha256=$(printf %064d 1); mkdir -p a/b; echo remember > a/b/note")
    before = machine.shell(PCR)
    machine.hibernate()
    assert list(machine.directory.iterdir()) == [machine.image]
    machine.resume()
    assert machine.shell("cat a/b/note") == b"remember\n"
    assert machine.shell(PCR) == before


def test_a_suspended_machine_goes_on_as_if_nothing_had_been(machine: RunningMachine) -> None:
    machine.shell("tpm2_pcrextend 16:sha256=$(printf %064d 1); echo remember > note")
    before = machine.shell(PCR)
    for _ in range(2):
        machine.suspend()
        machine.suspend()  # said again, as by an agent that has died meanwhile
        assert machine.state() == "suspended"
        with pytest.raises(WrongState):
            machine.run("true")
        machine.go_on()
        machine.go_on()
        assert machine.shell(f"cat note; {PCR}") == b"remember\n" + before


def test_nothing_runs_in_a_suspended_machine(machine: RunningMachine) -> None:
    pids = left_behind(machine)
    machine.suspend()
    assert ended(pids)
    assert machine.sp.vm(machine.vm_id).vtpm is not None
    machine.power_off()


@pytest.mark.attack("A21")
def test_directories_nested_deep_keep_nobody_from_clearing_up(machine: RunningMachine) -> None:
    machine.shell("i=0; while [ $i -lt 2000 ]; do mkdir d; cd d; i=$((i+1)); done")  # Python recurses less deep
    machine.suspend()
    machine.go_on()
    machine.power_off()
    machine.image.unlink()
    assert list(machine.directory.iterdir()) == []


def test_memory_that_does_not_fit_an_image_is_told_and_the_machine_runs_on(machine: RunningMachine) -> None:
    machine.shell("head -c 20000000 /dev/zero > much")
    with pytest.raises(SpvtpmError, match="more than"):
        machine.suspend()
    assert machine.state() == "running"
    assert not machine.image.exists()
    assert len(machine.shell("rm much; tpm2_getrandom 4")) == 4
    machine.suspend()


def test_it_ends_with_its_boot(machine: RunningMachine) -> None:
    machine.sp.info(StopVm(vm_id=machine.vm_id))
    assert machine.wait() != 0
    assert "taken the vTPM's interface away" in machine.log()
    assert not machine.memory.exists()


def test_it_ends_with_its_secure_processor(machine: RunningMachine) -> None:
    pids = left_behind(machine)
    machine.sp.kill()
    assert machine.wait() != 0
    assert "taken the vTPM's interface away" in machine.log()
    assert ended(pids)
    machine.sp.start()


def test_a_suspended_machine_does_not_mind_that_its_vtpm_is_hibernated(machine: RunningMachine) -> None:
    machine.suspend()
    machine.sp.info(HibernateVm(vm_id=machine.vm_id))
    assert machine.state() == "suspended"


@pytest.mark.attack("A10")
def test_a_second_machine_of_the_same_boot_gets_no_key(machine: RunningMachine) -> None:
    with RunningMachine(machine.sp) as other:
        other.vm_id = machine.vm_id
        other.spawn(machine.sp.vm(machine.vm_id))
        assert other.wait() != 0
        assert "was taken before" in other.log()
        assert list(other.directory.iterdir()) == []
    assert len(machine.shell("tpm2_getrandom 4")) == 4


@pytest.mark.attack("A10")
def test_an_image_of_another_vm_is_refused_and_kept(machine: RunningMachine, new: RunningMachine) -> None:
    machine.shell("echo of another VM > note")
    machine.suspend()
    new.image.write_bytes(machine.image.read_bytes())
    new.image.chmod(0o600)
    new.spawn(new.sp.info(LaunchVm(vm_id=new.vm_id)), "--resume")
    assert new.wait() != 0
    assert "another VM's" in new.log()
    assert list(new.directory.iterdir()) == [new.image]


@pytest.mark.attack("A02")
def test_an_altered_image_is_refused_and_nothing_of_it_is_restored(machine: RunningMachine) -> None:
    machine.hibernate()
    content = bytearray(machine.image.read_bytes())
    content[100] ^= 1
    machine.image.write_bytes(content)
    with pytest.raises(AssertionError, match="was altered"):
        machine.resume()
    machine.wait()
    assert list(machine.directory.iterdir()) == [machine.image]


@pytest.mark.attack("A24")
def test_the_key_and_the_memory_are_in_no_file_and_nothing_others_see(machine: RunningMachine) -> None:
    machine.shell("echo MARKER-OF-THE-MEMORY > note")
    machine.suspend()
    image = machine.image.read_bytes()
    process = b"".join(Path(f"/proc/{machine.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    seen = image + process + machine.log_path.read_bytes()
    assert b"--secret" in process
    for secret in (machine.key, b"MARKER-OF-THE-MEMORY"):
        assert secret not in seen and secret.hex().encode() not in seen
    files = [path for path in machine.directory.rglob("*") if path.is_file()]
    assert [path for path in files if machine.key in path.read_bytes()] == []


@pytest.mark.attack("A24")
def test_a_program_in_the_vm_gets_neither_the_key_nor_what_the_machine_holds_open(machine: RunningMachine) -> None:
    inherited = machine.shell("env; ls -l /proc/self/fd; cat /proc/self/limits")
    assert machine.key.hex().encode() not in inherited
    assert b"memfd" not in inherited and b"eventfd" not in inherited
    assert [line.split()[4] for line in inherited.splitlines() if line.startswith(b"Max core file size")] == [b"0"]


@pytest.mark.attack("A24")
@pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")
def test_a_program_in_a_vm_with_a_user_of_its_own_cannot_read_the_machines_memory(state_directory: Path) -> None:
    if not user_reaches_the_program():
        pytest.skip("another user cannot reach the program")
    state_directory.parent.chmod(0o711)
    with (
        RunningSp(state_directory, config="vm_uids = [200000, 10]\n") as sp,
        RunningMachine(sp, uid=200_001) as machine,
    ):
        machine.begin()
        assert len(machine.shell("tpm2_getrandom 4")) == 4
        assert machine.shell("id -u") == b"200001\n"
        code, out, _err = machine.run("cat", f"/proc/{machine.pid}/mem", f"/proc/{machine.pid}/environ")
        assert code != 0 and out == b""
        code, out, _err = machine.run("sh", "-c", "cat /proc/self/environ")  # what it may look at, it can read
        assert code == 0 and b"TPM2TOOLS_TCTI" in out


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "said",
    [b"\0", b"\xff" * 100, encode_control(AwaitReady())[:-1], b"\1" + b"\x81" * 1000],
    ids=["another version", "noise", "cut", "nested"],
)
def test_what_is_no_request_of_its_hypervisor_is_refused_and_it_runs_on(machine: RunningMachine, said: bytes) -> None:
    with pytest.raises(MessageError):
        machine.ask(said)
    assert machine.state() == "running"


@pytest.mark.attack("A25")
@pytest.mark.parametrize("sent", [b"\0\0\0\0", b"\xff\xff\xff\xff", (MAX_CONTROL_BYTES + 1).to_bytes(4, "big")])
def test_what_is_no_frame_ends_the_connection_alone(machine: RunningMachine, sent: bytes) -> None:
    for name in ("control.sock", "console.sock"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(machine.directory / name))
            if name == "console.sock" and sent[0] == 0 and sent[3]:
                continue  # consoles have longer frames
            connection.sendall(sent)
            while connection.recv(4096):
                pass
    assert machine.state() == "running"


def test_many_requests_may_come_on_one_connection(machine: RunningMachine) -> None:
    request = encode_frame(encode_control(AwaitReady()))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(str(machine.directory / "control.sock"))
        for _ in range(3):
            connection.sendall(request)
            assert b"running" in connection.recv(4096)


def test_a_reset_is_another_boot_for_another_machine(machine: RunningMachine) -> None:
    info = machine.sp.info(ResetVm(vm_id=machine.vm_id))
    assert machine.run("tpm2_getrandom", "4")[0] != 0  # the PCRs of that boot do not tell of these programs
    machine.kill()
    machine.spawn(info)
    machine.await_ready()
    assert len(machine.shell("tpm2_getrandom 4")) == 4


@pytest.mark.attack("A27")
@pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")
def test_another_user_may_connect_to_no_socket_of_the_machine(machine: RunningMachine) -> None:
    for path in (machine.directory, *machine.directory.parents):
        if path.stat().st_mode & 0o001 == 0:
            path.chmod(0o711)
    for name in ("control.sock", "console.sock", "tpm", "tpm.ctrl"):
        path = machine.directory / name
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)  # even so
    os.seteuid(200_002)
    try:
        for name in ("control.sock", "console.sock"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(PATIENCE_S)
                connection.connect(str(machine.directory / name))
                assert connection.recv(1) == b""
    finally:
        os.seteuid(0)
    assert machine.state() == "running"
