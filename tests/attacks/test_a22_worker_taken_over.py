"""A22: a worker process taken over. Arbitrary code runs where the guest's commands run, and tries to reach anything else.

Every attack is run three ways, each time in a fresh fork of a fresh interpreter, as workers are: free, where it must
succeed, or it would show nothing; as a worker is confined; and confined by a kernel that gives no namespaces, as in many
containers, where the system call filter must do alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from spvtpm.processor.worker import linux
from spvtpm.processor.worker.sandbox import Sandbox, enter_namespaces
from spvtpm.processor.worker.seccomp import system_call_number

SECRET = b"another vTPM's seed"
HOST_FILE = Path(__file__)
LIBC = ctypes.CDLL(None, use_errno=True)
BUFFER = ctypes.create_string_buffer(4096)
OTHER_PROCESS_SECRET = ctypes.create_string_buffer(len(SECRET))
"""Filled in the other process only; forks have it at the same address."""

FREE, CONFINED, CONFINED_WITHOUT_NAMESPACES = "free", "confined", "confined without namespaces"


class Target:
    """What there is to attack: made before the sandbox is entered, like the rest of the host."""

    def __init__(self, writable: Path) -> None:
        self.writable = writable
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0spvtpm-a22-{os.getpid()}")
        self.abstract.listen()
        # Addresses are noted now: asking later would be one more system call.
        self.tcp_address, self.abstract_address = self.tcp.getsockname(), self.abstract.getsockname()
        self.handle = file_handle(HOST_FILE)
        self.mount_descriptor = os.open(HOST_FILE, os.O_RDONLY)
        self.other_process = 0


def system_call(name: str, *arguments: Any) -> int:
    """A bare system call, as shellcode would make it."""
    number = system_call_number(name)
    assert number is not None
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result: int = LIBC.syscall(ctypes.c_long(number), *words)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def file_handle(path: Path) -> Any:
    """Source: name_to_handle_at(2); the handle begins with its size."""
    handle = ctypes.create_string_buffer(136)
    ctypes.c_uint.from_buffer(handle).value = 128
    mount = ctypes.c_int()
    return handle if LIBC.name_to_handle_at(-100, bytes(path), handle, ctypes.byref(mount), 0) == 0 else None


def read_a_file(_target: Target) -> None:
    assert HOST_FILE.read_bytes()


def write_a_file(target: Target) -> None:
    target.writable.write_bytes(b"owned")


def look_whether_a_file_exists(_target: Target) -> None:
    HOST_FILE.stat()


def list_a_directory(_target: Target) -> None:
    assert os.listdir("/proc")  # noqa: PTH208


def open_a_file_by_handle(target: Target) -> None:
    if target.handle is None:
        raise OSError(errno.EOPNOTSUPP, "no handles on this file system")
    system_call("open_by_handle_at", target.mount_descriptor, target.handle, os.O_RDONLY)


def connect_over_tcp(target: Target) -> None:
    socket.socket(socket.AF_INET).connect(target.tcp_address)


def connect_to_an_abstract_socket(target: Target) -> None:
    socket.socket(socket.AF_UNIX).connect(target.abstract_address)


def read_memory_by_ptrace(target: Target) -> None:
    system_call("ptrace", 0x4206, target.other_process, 0, 0)  # PTRACE_SEIZE


def read_memory_by_proc(target: Target) -> None:
    with Path(f"/proc/{target.other_process}/mem").open("rb", buffering=0) as memory:
        memory.seek(ctypes.addressof(OTHER_PROCESS_SECRET))
        assert memory.read(len(SECRET)) == SECRET


def read_memory_by_process_vm_readv(target: Target) -> None:
    vector = (ctypes.c_size_t * 4)(ctypes.addressof(BUFFER), len(SECRET), 0, 0)
    vector[2], vector[3] = ctypes.addressof(OTHER_PROCESS_SECRET), len(SECRET)
    remote = ctypes.byref(vector, 2 * ctypes.sizeof(ctypes.c_size_t))
    system_call("process_vm_readv", target.other_process, vector, 1, remote, 1, 0)
    assert BUFFER.raw[: len(SECRET)] == SECRET


def kill_a_process(target: Target) -> None:
    os.kill(target.other_process, signal.SIGTERM)


def signal_a_thread_of_a_process(target: Target) -> None:
    system_call("tgkill", target.other_process, target.other_process, int(signal.SIGTERM))


def send_a_signal_by_descriptor(target: Target) -> None:
    fcntl.fcntl(target.tcp, fcntl.F_SETOWN, target.other_process)


def open_a_process(target: Target) -> None:
    os.pidfd_open(target.other_process)


def change_limits_of_a_process(target: Target) -> None:
    system_call("prlimit64", target.other_process, 7, 0, BUFFER)


def execute_a_program(_target: Target) -> NoReturn:
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "print('succeeded')"])  # noqa: S606


def fork_a_process(_target: Target) -> None:
    if os.fork() == 0:
        os._exit(0)


def fork_by_bare_clone(_target: Target) -> None:
    if system_call("clone", int(signal.SIGCHLD), 0, 0, 0, 0) == 0:
        os._exit(0)


def start_threads_without_end(_target: Target) -> None:
    threading.stack_size(32768)
    for _ in range(200):
        threading.Thread(target=time.sleep, args=[60], daemon=True).start()


def map_executable_memory(_target: Target) -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def make_memory_executable(_target: Target) -> None:
    area = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    system_call("mprotect", address, 4096, mmap.PROT_READ | mmap.PROT_EXEC)


def make_a_memory_file(_target: Target) -> None:
    os.memfd_create("code")


def enter_a_user_namespace(_target: Target) -> None:
    system_call("unshare", linux.CLONE_NEWUSER)


def mount_a_file_system(target: Target) -> None:
    directory = target.writable.parent
    system_call("mount", b"none", bytes(directory), b"tmpfs", 0, 0)
    system_call("umount2", bytes(directory), 0)


def become_dumpable_again(_target: Target) -> None:
    linux.set_dumpable(True)


def set_up_io_uring(_target: Target) -> None:
    system_call("io_uring_setup", 1, ctypes.create_string_buffer(120))


def load_bpf(_target: Target) -> None:
    system_call("bpf", 0, (ctypes.c_uint32 * 18)(2, 4, 4, 1), 72)  # an array map of one entry


def use_a_kernel_keyring(_target: Target) -> None:
    system_call("keyctl", 0, -3, 1)  # KEYCTL_GET_KEYRING_ID of the session


def watch_page_faults(_target: Target) -> None:
    system_call("userfaultfd", 1)


def count_events(_target: Target) -> None:
    attributes = (ctypes.c_uint32 * 32)(1, 128)  # PERF_TYPE_SOFTWARE
    system_call("perf_event_open", attributes, 0, -1, -1, 0)


def share_system_v_memory(_target: Target) -> None:
    LIBC.shmctl(system_call("shmget", 0, 4096, 0o1600), 0, None)


def control_a_device(target: Target) -> None:
    fcntl.ioctl(target.tcp, termios.FIOCLEX)


ATTACKS: list[Callable[[Target], None]] = [
    read_a_file,
    write_a_file,
    look_whether_a_file_exists,
    list_a_directory,
    open_a_file_by_handle,
    connect_over_tcp,
    connect_to_an_abstract_socket,
    read_memory_by_ptrace,
    read_memory_by_proc,
    read_memory_by_process_vm_readv,
    kill_a_process,
    signal_a_thread_of_a_process,
    send_a_signal_by_descriptor,
    open_a_process,
    change_limits_of_a_process,
    execute_a_program,
    fork_a_process,
    fork_by_bare_clone,
    start_threads_without_end,
    map_executable_memory,
    make_memory_executable,
    make_a_memory_file,
    enter_a_user_namespace,
    mount_a_file_system,
    become_dumpable_again,
    set_up_io_uring,
    load_bpf,
    use_a_kernel_keyring,
    watch_page_faults,
    count_events,
    share_system_v_memory,
    control_a_device,
]


def attempt(attack: Callable[[Target], None], target: Target, sandbox: Sandbox | None) -> str:
    """Runs one attack in a fork of this process: "succeeded", "refused: …" or "killed: …"."""
    zygote = os.getpid()
    target.other_process = start_other_process()
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            os.dup2(writer, 1)
            if sandbox is not None:
                sandbox.confine(expected_parent=zygote)
            os.write(1, b"confined\n")
            attack(target)
            os.write(1, b"succeeded\n")
        except (OSError, RuntimeError) as error:
            os.write(1, f"refused: {error}\n".encode())
        finally:
            os._exit(1)
    os.close(writer)
    said = read_to_the_end(reader)
    os.kill(worker, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    os.kill(target.other_process, signal.SIGKILL)
    os.waitpid(target.other_process, 0)
    begun, _, outcome = said.partition("\n")
    if begun != "confined":
        return f"broken: {said}"
    return outcome.strip() or (f"killed: {signal.Signals(-status).name}" if status < 0 else f"broken: exit {status}")


def start_other_process() -> int:
    """A process beside the worker, as another vTPM's would be, that holds a secret."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        OTHER_PROCESS_SECRET.raw = SECRET
        os.write(writer, b"x")
        signal.pause()
        os._exit(0)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return pid


def read_to_the_end(reader: int) -> str:
    """What was said until the other end closed, or until 10 seconds passed."""
    said = b""
    while select.select([reader], [], [], 10)[0] and (part := os.read(reader, 4096)):
        said += part
    os.close(reader)
    return said.decode()


def sentences_of(sandbox: Sandbox | None) -> list[str]:
    """What `confine` says is missing, asked of a throw-away fork."""
    reader, writer = os.pipe()
    zygote, worker = os.getpid(), os.fork()
    if worker == 0:
        missing = [] if sandbox is None else sandbox.confine(expected_parent=zygote)
        os.write(writer, "\n".join(missing).encode())
        os._exit(0)
    os.close(writer)
    said = read_to_the_end(reader)
    os.waitpid(worker, 0)
    return said.splitlines()


def refuse_namespaces(flags: int) -> None:
    """What `unshare` does in many containers."""
    raise PermissionError(errno.EPERM, "unshare: Operation not permitted")


def main(mode: str) -> None:
    """What the fresh interpreter does: run every attack, print the outcomes."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        target = Target(Path(directory) / "file")
        sandbox = None if mode == FREE else Sandbox.prepare()
        worker = os.fork()
        if worker == 0:
            if mode == CONFINED_WITHOUT_NAMESPACES:
                linux.unshare = refuse_namespaces
            missing = [] if mode == FREE else enter_namespaces()
            # The process namespace begins with the next fork.
            if (zygote := os.fork()) == 0:
                outcomes = {attack.__name__: attempt(attack, target, sandbox) for attack in ATTACKS}
                missing += sentences_of(sandbox)
                print(json.dumps({"missing": missing, "outcomes": outcomes}), flush=True)
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(zygote, 0)[1]) & 0xFF)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))


if __name__ == "__main__":
    main(sys.argv[1])


class Outcomes:
    """Every attack's outcome in one mode."""

    def __init__(self, mode: str) -> None:
        run = subprocess.run(
            [sys.executable, "-m", __name__, mode],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=HOST_FILE.parents[2],
        )
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout)
        self.missing: list[str] = result["missing"]
        self.of: dict[str, str] = result["outcomes"]


@pytest.fixture(scope="module")
def free() -> Outcomes:
    return Outcomes(FREE)


@pytest.fixture(scope="module")
def confined() -> Outcomes:
    return Outcomes(CONFINED)


@pytest.fixture(scope="module")
def confined_without_namespaces() -> Outcomes:
    return Outcomes(CONFINED_WITHOUT_NAMESPACES)


def assert_stopped(attack: str, free: Outcomes, confined: Outcomes) -> None:
    """The attack works when nothing stops it, and does not in the sandbox."""
    if free.of[attack].startswith("refused"):
        pytest.skip(f"cannot be shown to work here ({free.of[attack]}); in the sandbox {confined.of[attack]}")
    assert free.of[attack] == "succeeded"
    assert confined.of[attack].startswith(("refused: ", "killed: SIGSYS"))


@pytest.mark.attack("A22")
@pytest.mark.parametrize("attack", [attack.__name__ for attack in ATTACKS])
def test_what_works_outside_the_sandbox_fails_inside(attack: str, free: Outcomes, confined: Outcomes) -> None:
    if attack == start_threads_without_end.__name__ and any("threads" in sentence for sentence in confined.missing):
        pytest.skip("this kernel gives no user namespaces, and the sandbox says so")
    assert_stopped(attack, free, confined)


@pytest.mark.attack("A22")
@pytest.mark.parametrize("attack", [attack.__name__ for attack in ATTACKS if attack is not start_threads_without_end])
def test_it_fails_as_well_where_the_kernel_gives_no_namespaces(
    attack: str, free: Outcomes, confined_without_namespaces: Outcomes
) -> None:
    assert_stopped(attack, free, confined_without_namespaces)


@pytest.mark.attack("A22")
def test_without_namespaces_threads_are_not_bounded_and_the_log_is_told(
    confined_without_namespaces: Outcomes,
) -> None:
    sentences = " ".join(confined_without_namespaces.missing)
    assert "no namespaces of their own" in sentences
    assert confined_without_namespaces.of["start_threads_without_end"] == "succeeded"
    assert "nothing bounds the number of a worker's threads" in sentences
