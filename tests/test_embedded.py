"""`spvtpm.VTPM`: a vTPM in any script, alone or many at once, kept or thrown away, and what becomes of it in accidents."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import spvtpm
from spvtpm.embedded import VTPM
from spvtpm.wire.errors import StateInUse, StorageError, WorkerError
from tests import tpm_commands as tpm
from tests.processor.processes import Doomed, descendants
from tests.throwaway import run_in_child

pytestmark = pytest.mark.claim("B8")

NV_INDEX = 0x01500020
RC_NV_UNAVAILABLE = 0x923  # Source: TCG TPM 2.0 Library Part 2, table "TPM_RC constants"
needs_tools = pytest.mark.skipif(shutil.which("tpm2_getrandom") is None, reason="tpm2-tools are not installed")


@pytest.fixture
def state() -> Iterator[Path]:
    """A directory for a TPM; does not exist yet."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        yield Path(path) / "tpm"


def write(vtpm: VTPM, content: bytes) -> None:
    if tpm.response_code(vtpm.transmit(tpm.nv_read(NV_INDEX, len(content)))) != tpm.RC_SUCCESS:
        tpm.checked(vtpm.transmit(tpm.nv_define(NV_INDEX, len(content))))
    tpm.checked(vtpm.transmit(tpm.nv_write(NV_INDEX, content)))


def read(vtpm: VTPM, size_bytes: int) -> bytes:
    return tpm.nv_content_in(vtpm.transmit(tpm.nv_read(NV_INDEX, size_bytes)))


def endorsement_key(vtpm: VTPM) -> bytes:
    made = vtpm.transmit(tpm.create_primary(tpm.ecc_p256(), tpm.ENDORSEMENT))
    tpm.checked(vtpm.transmit(tpm.flush_context(tpm.handle_in(made))))
    return tpm.public_in(made)


def extended(vtpm: VTPM, pcr: int = 16) -> bytes:
    tpm.checked(vtpm.transmit(tpm.pcr_extend(pcr, bytes(range(32)))))
    return tpm.pcr_in(vtpm.transmit(tpm.pcr_read(pcr)))


def with_its_worker(make: Callable[[], VTPM]) -> tuple[VTPM, Doomed]:
    """A new vTPM and the process that runs it."""
    with VTPM():  # the zygote is there from now on
        before = descendants(os.getpid())
        vtpm = make()
        (worker,) = set(descendants(os.getpid())) - set(before)
    return vtpm, Doomed(worker)


def script(text: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python program of a user; says something once it has come to where it waits for its input to end."""
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


# Use


def test_the_package_offers_it_by_its_short_name() -> None:
    assert spvtpm.VTPM is VTPM
    with pytest.raises(AttributeError, match="VTMP"):
        _ = spvtpm.VTMP


def test_naming_the_package_alone_loads_no_domain_of_it() -> None:
    program = "import sys, spvtpm; print([name for name in sys.modules if name.startswith('spvtpm.')])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_a_new_one_is_manufactured_powered_on_and_started() -> None:
    with VTPM() as vtpm:
        assert len(tpm.random_in(vtpm.transmit(tpm.get_random(16)))) == 16
        assert tpm.response_code(vtpm.transmit(tpm.startup())) == tpm.RC_INITIALIZE


@pytest.mark.parametrize("size", [0, 4097, 1 << 20])
def test_a_command_out_of_bounds_is_refused_and_the_vtpm_goes_on(size: int) -> None:
    with VTPM() as vtpm:
        with pytest.raises(ValueError, match="1 to 4096 bytes"):
            vtpm.transmit(bytes(size))
        tpm.checked(vtpm.transmit(tpm.get_random(8)))


@pytest.mark.parametrize("size", [1, 9, 10, 4096])
def test_a_command_within_bounds_that_is_none_gets_the_tpms_error(size: int) -> None:
    with VTPM() as vtpm:
        assert tpm.response_code(vtpm.transmit(bytes(size))) != tpm.RC_SUCCESS
        tpm.checked(vtpm.transmit(tpm.get_random(8)))


@pytest.mark.parametrize("kept", [False, True])
def test_a_reset_forgets_pcrs_and_keeps_nv_and_seeds(state: Path, kept: bool) -> None:
    with VTPM(state if kept else None) as vtpm:
        write(vtpm, b"kept")
        key, first = endorsement_key(vtpm), extended(vtpm)
        before = tpm.clock_in(vtpm.transmit(tpm.read_clock()))
        for turn in range(1, 4):
            vtpm.reset()
            assert tpm.pcr_in(vtpm.transmit(tpm.pcr_read(16))) == bytes(32)
            assert extended(vtpm) == first
            assert (read(vtpm, 4), endorsement_key(vtpm)) == (b"kept", key)
            assert tpm.clock_in(vtpm.transmit(tpm.read_clock())).reset_count == before.reset_count + turn


@needs_tools
def test_its_tcti_serves_tpm2_tools_and_ends_with_it() -> None:
    with VTPM() as vtpm:
        tcti = vtpm.tcti
        assert vtpm.tcti == tcti
        clients = [
            subprocess.Popen(["tpm2_getrandom", "--hex", "8", "-T", tcti], stdout=subprocess.PIPE) for _ in range(4)
        ]
        answers = {client.communicate(timeout=60)[0] for client in clients}
        assert {len(answer) for answer in answers} == {16}
        assert len(answers) == 4
        extended(vtpm)
        sockets = Path(tcti.removeprefix("swtpm:path=")).parent
        assert sockets.stat().st_mode & 0o777 == 0o700
        vtpm.reset()
        assert subprocess.run(["tpm2_getrandom", "8", "-T", tcti], stdout=subprocess.PIPE, timeout=60).returncode == 0
    assert not sockets.exists()


def test_commands_of_many_threads_queue() -> None:
    threads, rounds = 8, 50

    def work() -> None:
        for _ in range(rounds):
            tpm.checked(vtpm.transmit(tpm.pcr_extend(16, b"d" * 32)))

    with VTPM() as vtpm:
        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        wanted = bytes(32)
        for _ in range(threads * rounds):
            wanted = hashlib.sha256(wanted + b"d" * 32).digest()
        assert tpm.pcr_in(vtpm.transmit(tpm.pcr_read(16))) == wanted


def test_many_at_once_are_all_different_and_know_nothing_of_each_other() -> None:
    made: list[VTPM] = []
    with ExitStack() as stack:
        makers = [threading.Thread(target=lambda: made.append(stack.enter_context(VTPM()))) for _ in range(24)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        for number, vtpm in enumerate(made):
            write(vtpm, b"%04d" % number)
        assert [read(vtpm, 4) for vtpm in made] == [b"%04d" % number for number in range(24)]
        assert len({endorsement_key(vtpm) for vtpm in made}) == 24
        assert len({vtpm.tcti for vtpm in made}) == 24


# The end


def test_closed_it_takes_no_commands_and_can_be_closed_again() -> None:
    vtpm = VTPM()
    for _ in range(2):
        vtpm.close()
        with pytest.raises(WorkerError, match="closed"):
            vtpm.transmit(tpm.get_random(8))


def test_its_process_ends_with_it_whatever_ended_it() -> None:
    vtpm, worker = with_its_worker(VTPM)
    with pytest.raises(ZeroDivisionError), vtpm:
        _ = 1 // 0
    worker.await_end()


def test_a_program_that_forgets_to_close_ends_and_leaves_no_process() -> None:
    program = "from spvtpm import VTPM; vtpm = VTPM(); vtpm.tcti; print('ready', flush=True); input()"
    with script(program) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        family = [Doomed(pid) for pid in descendants(process.pid)]
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert family
    for member in family:
        member.await_end()


# Kept in a directory


def test_what_is_kept_is_there_when_it_is_opened_again(state: Path) -> None:
    with VTPM(state) as vtpm:
        write(vtpm, b"kept")
        key = endorsement_key(vtpm)
        extended(vtpm)
    for opened in (str(state), state):
        with VTPM(opened) as vtpm:
            assert (read(vtpm, 4), endorsement_key(vtpm)) == (b"kept", key)
            assert tpm.pcr_in(vtpm.transmit(tpm.pcr_read(16))) == bytes(32)
    assert state.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in state.iterdir() if path.name != "lock"} == {0}


WRITE_AND_WAIT = """
import sys
from pathlib import Path
from tests.test_embedded import VTPM, write
vtpm = VTPM(Path(sys.argv[1]))
write(vtpm, sys.argv[2].encode())
print("durable", flush=True)
sys.stdin.read()
"""


@pytest.mark.attack("A16")
def test_what_was_acknowledged_survives_kill_9_of_the_program_and_its_processes_end(state: Path) -> None:
    for content in ("one!", "two!", "six!"):
        with script(WRITE_AND_WAIT, state, content) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "durable\n"
            family = [Doomed(pid) for pid in descendants(process.pid)]
            process.kill()
        for member in family:
            member.await_end()
        with VTPM(state) as vtpm:
            assert read(vtpm, 4) == content.encode()


def test_a_directory_in_use_is_refused_to_this_process_and_to_others(state: Path) -> None:
    with VTPM(state) as vtpm:
        with pytest.raises(StateInUse, match=str(state)):
            VTPM(state)
        with script("import sys; from spvtpm import VTPM; VTPM(sys.argv[1])", state) as other:
            other.communicate(timeout=60)
        assert other.returncode == 1
        tpm.checked(vtpm.transmit(tpm.get_random(8)))
    VTPM(state).close()


def test_a_directory_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=str(place)):
            VTPM(place)


@pytest.mark.attack("A23")
def test_without_room_on_the_disk_nothing_is_acknowledged_and_with_room_it_goes_on(state: Path) -> None:
    def use() -> None:
        with VTPM(state) as vtpm:
            write(vtpm, b"earlier")
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            assert tpm.response_code(vtpm.transmit(tpm.nv_write(NV_INDEX, b"refused"))) == RC_NV_UNAVAILABLE
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            write(vtpm, b"laterOn")

    run_in_child(use)
    with VTPM(state) as vtpm:
        assert read(vtpm, 7) == b"laterOn"


# Accidents


@pytest.mark.attack("A22")
@pytest.mark.parametrize("kept", [False, True])
def test_a_killed_worker_is_an_error_until_a_reset_brings_back_what_was_durable(state: Path, kept: bool) -> None:
    with VTPM() as neighbour:
        write(neighbour, b"mine")
        vtpm, worker = with_its_worker(lambda: VTPM(state if kept else None))
        with vtpm:
            write(vtpm, b"kept")
            extended(vtpm)
            worker.kill()
            for _ in range(2):
                with pytest.raises(WorkerError, match="died"):
                    vtpm.transmit(tpm.get_random(8))
            vtpm.reset()
            assert read(vtpm, 4) == b"kept"
            assert tpm.pcr_in(vtpm.transmit(tpm.pcr_read(16))) == bytes(32)
        assert read(neighbour, 4) == b"mine"
        lost, worker = with_its_worker(VTPM)
        worker.kill()
        lost.close()


def test_when_all_its_processes_are_killed_a_reset_and_a_new_one_work() -> None:
    def use() -> None:
        with VTPM() as vtpm:
            write(vtpm, b"kept")
            for member in [Doomed(pid) for pid in descendants(os.getpid())]:
                member.kill()
            with pytest.raises(WorkerError):
                vtpm.transmit(tpm.get_random(8))
            with VTPM() as other:
                tpm.checked(other.transmit(tpm.get_random(8)))
            vtpm.reset()
            assert read(vtpm, 4) == b"kept"

    run_in_child(use)


def test_a_fork_of_the_program_has_vtpms_of_its_own_and_leaves_the_others_alone() -> None:
    def use() -> tuple[bytes, bytes]:
        with VTPM() as own:
            write(own, b"fork")
            own.reset()
            return read(own, 4), endorsement_key(own)

    with VTPM() as vtpm:
        write(vtpm, b"mine")
        forks = [run_in_child(use) for _ in range(3)]
        assert read(vtpm, 4) == b"mine"
        keys = {key for _content, key in forks} | {endorsement_key(vtpm)}
        assert len(keys) == 4
    with VTPM() as later:
        tpm.checked(later.transmit(tpm.get_random(8)))


FORK_AND_EXIT = """
import os, sys
from tests.test_embedded import VTPM, read, write
with VTPM() as vtpm:
    write(vtpm, b"mine")
    if os.fork() == 0:
        with VTPM() as own:
            write(own, b"fork")
        sys.exit(0)  # runs what is registered for the end of the program
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    vtpm.reset()
    print(read(vtpm, 4).decode(), flush=True)
"""


def test_a_fork_that_ends_in_order_does_not_end_its_parents_vtpms() -> None:
    with script(FORK_AND_EXIT) as process:
        said, _nothing = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "mine\n")


def test_a_worker_killed_in_the_middle_of_a_command_is_an_error() -> None:
    vtpm, worker = with_its_worker(VTPM)
    with vtpm, ThreadPoolExecutor(1) as pool:
        worker.stop()
        answer = pool.submit(vtpm.transmit, tpm.get_random(8))
        worker.kill()
        with pytest.raises(WorkerError, match="died"):
            answer.result(60)


@pytest.mark.parametrize("kept", [False, True])
def test_closed_it_stays_closed(state: Path, kept: bool) -> None:
    vtpm = VTPM(state if kept else None)
    vtpm.close()
    for use in (vtpm.reset, lambda: vtpm.tcti, lambda: vtpm.transmit(tpm.get_random(8))):
        with pytest.raises(WorkerError, match="closed"):
            use()
