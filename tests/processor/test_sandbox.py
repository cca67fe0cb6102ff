"""The sandbox from the inside: what a worker needs still works, what the kernel does not give is said."""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from spvtpm.engine.libtpms import Engine
from spvtpm.processor.worker import landlock, linux
from spvtpm.processor.worker.sandbox import Sandbox, enter_namespaces
from spvtpm.processor.worker.seccomp import Rules, compile_filter, load_rules, system_call_number
from tests import tpm_commands as tpm
from tests.harness import RunningSp
from tests.throwaway import run_in_child

REPOSITORY = Path(__file__).parents[2]


def use_a_thread(_peer: socket.socket) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.set)
    thread.start()
    thread.join()
    assert done.is_set()


def use_received_memory_and_doorbells(peer: socket.socket) -> None:
    _data, (memory, heard, rung), _flags, _address = socket.recv_fds(peer, 1, 3)
    with mmap.mmap(memory, 4096) as shared:
        os.close(memory)
        assert shared[:5] == b"hello"
        shared[:5] = b"world"
    poll = select.poll()
    poll.register(heard, select.POLLIN)
    assert poll.poll(10_000)
    assert os.eventfd_read(heard) == 7
    os.eventfd_write(rung, 9)


def talk_over_an_inherited_socket(peer: socket.socket) -> None:
    peer.sendall(b"ping")
    assert peer.recv(1) == b"x"


def draw_random_numbers(_peer: socket.socket) -> None:
    assert os.urandom(32) != os.getrandom(32)
    assert len(ssl.RAND_bytes(32)) == 32


def sleep_and_tell_the_time(_peer: socket.socket) -> None:
    before = time.monotonic()
    time.sleep(0.001)
    assert time.monotonic() > before
    assert time.time() > 0


def use_memory(_peer: socket.socket) -> None:
    content = bytearray(32 << 20)
    content.extend(bytes(1 << 20))


def make_a_traceback(_peer: socket.socket) -> None:
    try:
        raise ValueError("its source lines cannot be read")
    except ValueError:
        assert "ValueError" in traceback.format_exc()


def fail_gently_to_open_a_file(_peer: socket.socket) -> None:
    with pytest.raises(PermissionError):
        Path("/etc/ssl/openssl.cnf").read_bytes()


def run_a_tpm(_peer: socket.socket) -> None:
    with Engine(lambda _permanent: None) as engine:
        engine.manufacture()
        tpm.checked(engine.process(tpm.startup()))
        assert tpm.checked(engine.process(tpm.get_random(16)))


NEEDS: list[Callable[[socket.socket], None]] = [
    use_a_thread,
    use_received_memory_and_doorbells,
    talk_over_an_inherited_socket,
    draw_random_numbers,
    sleep_and_tell_the_time,
    use_memory,
    make_a_traceback,
    fail_gently_to_open_a_file,
    run_a_tpm,
]


def main(name: str) -> None:
    """What the fresh interpreter does: as the zygote, one confined fork."""
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("memory")
    os.write(memory, b"hello".ljust(4096, b"\0"))
    heard, rung = os.eventfd(7), os.eventfd(0)
    socket.send_fds(ours, [b"x"], [memory, heard, rung])
    Engine.warm_up()
    sandbox = Sandbox.prepare()
    enter_namespaces()
    zygote, worker = os.getpid(), os.fork()
    if worker == 0:
        # The first process of a process namespace sees its parent as 0.
        sandbox.confine(expected_parent=os.getppid() if os.getpid() == 1 else zygote)
        status = 1
        try:
            globals()[name](theirs)
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if name == use_received_memory_and_doorbells.__name__:
        assert os.pread(memory, 5, 0) == b"world"
        assert os.eventfd_read(rung) == 9
    os._exit(status & 0xFF)


if __name__ == "__main__":
    main(sys.argv[1])


@pytest.mark.parametrize("need", [need.__name__ for need in NEEDS])
def test_a_worker_can_still_do_its_work(need: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", __name__, need], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert run.returncode == 0, f"exit code {run.returncode}: {run.stderr}"


def test_every_system_call_in_the_rules_has_a_number_and_every_error_a_name() -> None:
    rules = load_rules()
    for name in [rule.name for rule in rules.allow] + [rule.name for rule in rules.refuse]:
        system_call_number(name)  # raises for a name that no architecture has
    for refused in rules.refuse:
        assert refused.error in errno.errorcode.values()
    with pytest.raises(ValueError, match="no system call"):
        system_call_number("opne")


def test_a_call_is_both_allowed_and_refused_only_on_conditions() -> None:
    rules = load_rules()
    allowed = {rule.name: rule.when for rule in rules.allow}
    assert len(allowed) == len(rules.allow)
    for refused in rules.refuse:
        if refused.name in allowed:
            assert allowed[refused.name]
            assert refused.when


@pytest.mark.parametrize(
    "text",
    [
        'allow = [{name = "read", unless = 1}]\nrefuse = []',
        'allow = [{name = "read", when = [{argument = 6, mask = 1, value = 1}]}]\nrefuse = []',
        'allow = []\nrefuse = [{name = "open", error = "EACCES"}]',
        "allow = []\nrefuse = []\ndefault = 'allow'",
    ],
)
def test_rules_with_unknown_keys_or_impossible_values_are_not_taken(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.toml.decode(text, type=Rules)


def test_the_filter_kills_the_whole_process_never_one_thread() -> None:
    kill_process, allow, error, action = 0x80000000, 0x7FFF0000, 0x00050000, 0xFFFF0000  # linux/seccomp.h
    program = compile_filter(load_rules())
    answers = {
        k & action for code, _jt, _jf, k in struct.iter_unpack("=HBBI", program) if code == 0x06
    }  # BPF_RET | BPF_K
    assert answers == {kill_process, allow, error}


def _confine_by_kernel_with(abi: int) -> list[str]:
    def confine() -> list[str]:
        sandbox = Sandbox(compile_filter(load_rules()), abi)
        return sandbox.confine(expected_parent=os.getppid())

    return run_in_child(confine)


@pytest.mark.parametrize(
    ("abi", "said"),
    [
        (0, "has no Landlock"),
        (1, "does not bar truncation, TCP, device ioctls, signals and abstract sockets"),
        (3, "does not bar TCP, device ioctls, signals"),
        (5, "does not bar signals"),
    ],
)
def test_what_an_older_kernels_landlock_lacks_is_said(abi: int, said: str) -> None:
    if landlock.landlock_abi() < abi:
        pytest.skip("this kernel knows less")
    assert any(said in sentence for sentence in _confine_by_kernel_with(abi))


def test_namespaces_that_the_kernel_refuses_are_said() -> None:
    def refuse(flags: int) -> None:
        raise PermissionError(errno.EPERM, "unshare: Operation not permitted")

    def enter() -> list[str]:
        linux.unshare = refuse
        return enter_namespaces()

    assert any("no namespaces of their own" in sentence for sentence in run_in_child(enter))


def test_the_namespaces_alone_hide_files_processes_and_network() -> None:
    def enter() -> list[str]:
        missing = enter_namespaces()
        reader, writer = os.pipe()
        if os.fork() == 0:
            seen = [str(os.getpid()), *os.listdir("/"), *(name for _, name in socket.if_nameindex() if name != "lo")]  # noqa: PTH208
            try:
                os.mkdir("/new")  # noqa: PTH102
            except OSError as error:
                seen.append(os.strerror(error.errno or 0))
            os.write(writer, "\n".join(seen).encode())
            os._exit(0)
        os.wait()
        return missing or os.read(reader, 4096).decode().splitlines()

    seen = run_in_child(enter)
    if any("namespace" in sentence for sentence in seen):
        pytest.skip(f"not given here, and said so: {seen}")
    assert seen == ["1", "Read-only file system"]


def test_namespaces_given_in_name_only_are_said_one_by_one() -> None:
    def refuse_all_but_users(flags: int) -> None:
        if flags != linux.CLONE_NEWUSER:
            raise PermissionError(errno.EPERM, "unshare: Operation not permitted")

    def enter() -> list[str]:
        linux.unshare = refuse_all_but_users
        return enter_namespaces()

    sentences = run_in_child(enter)
    for name in ("mount", "network", "IPC", "process"):
        assert any(f"no {name} namespace" in sentence for sentence in sentences)


def test_a_worker_whose_zygote_is_gone_ends_at_once() -> None:
    def confine_orphan() -> int:
        pid = os.fork()
        if pid == 0:
            Sandbox(b"", 0).confine(expected_parent=os.getpid())  # anybody but its parent
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert run_in_child(confine_orphan) == 1


def test_a_worker_of_a_running_sp_is_confined(sp: RunningSp) -> None:
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        tpm.checked(driver.transmit(tpm.startup()))
        worker = sp.worker_of(driver.interface)
    lines = Path(f"/proc/{worker}/status").read_text().splitlines()
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {0}
    assert status["Uid"].split()[0] != "0"
    limits = Path(f"/proc/{worker}/limits").read_text()
    assert "Max core file size        0                    0" in limits
