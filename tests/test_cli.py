"""What a user of `spvtpm` sees: exit codes, one clear sentence and a hint when something is wrong, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm import cli
from spvtpm.guest.vm_key import create_vm_key
from spvtpm.wire import messages
from tests.harness import RunningSp
from tests.papers import put_chip_file

SPVTPM = (sys.executable, "-m", "spvtpm.cli")

COMMANDS = [
    ("sp", "init"),
    ("sp", "run"),
    ("sp", "status"),
    *(
        ("hypervisor", name)
        for name in (
            "admit",
            "launch",
            "create-vtpm",
            "start",
            "reset",
            "stop",
            "park",
            "wake",
            "hibernate",
            "endorsement",
            "list",
        )
    ),
    ("guest", "new-key"),
    ("guest", "tcti"),
    ("guest", "serve"),
    ("guest", "device"),
    ("guest", "machine"),
    *(("agent", name) for name in ("init", "address", "run")),
    *(
        ("cloud", name)
        for name in (
            "init",
            "run",
            "migrate",
            "add-user",
            "remove-user",
            "list-users",
            "new-token",
            "remove-token",
            "add-host",
            "remove-host",
            "list-hosts",
        )
    ),
    *(
        ("terminal", name)
        for name in (
            "init",
            "trust",
            "verify",
            "provision",
            "export",
            "destroy",
            "rotate-secret",
            "list",
            "status",
            "fate",
            "events",
            "endorsement",
            "forget",
            "inspect",
        )
    ),
    *(("vendor", name) for name in ("init", "manufacture", "revoke", "refresh-list", "raise-generation")),
    *(("host", name) for name in ("ls", "list", "drain", "undrain")),
    *((name,) for name in ("up", "login", "logout", "chips", "completion")),
    *(
        ("vm", name)
        for name in (
            "create",
            "ls",
            "list",
            "show",
            "start",
            "shutdown",
            "hibernate",
            "resume",
            "migrate",
            "recover",
            "export",
            "import",
            "destroy",
            "exec",
            "publish-pcrs",
            "attest",
            "events",
        )
    ),
]


@pytest.fixture(scope="module")
def sp() -> Iterator[RunningSp]:
    """A running SP for all tests of this module."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path, RunningSp(Path(path) / "sp") as running:
        yield running


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a path short enough for a secure processor."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        yield Path(path)


def spvtpm(*words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Runs the command line."""
    done = subprocess.run([*SPVTPM, *map(str, words)], input=stdin, capture_output=True, timeout=60)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def done(*words: str | Path) -> str:
    """Runs a command that must succeed; returns what it printed."""
    result = spvtpm(*words)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


def complaint(exit_code: int, *words: str | Path) -> str:
    """Runs a command that must fail with this code; returns its sentence. Checks that there is a hint, and nothing more."""
    result = spvtpm(*words)
    assert result.returncode == exit_code, result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
    sentence, hint = result.stderr.splitlines()
    assert sentence.startswith("spvtpm: ")
    assert hint.startswith("  ")
    assert hint.strip().endswith(".")
    return sentence


def guest(sp: RunningSp, vm_id: uuid.UUID, key: Path | None = None) -> list[str | Path]:
    """`guest tcti` for a VM."""
    return ["guest", "tcti", "--interface", sp.interface(vm_id), "--key", key or sp.key_file(vm_id)]


@pytest.fixture
def chip(tmp_path: Path) -> Path:
    """A chip file, fresh from the factory."""
    put_chip_file(tmp_path / "chip")
    return tmp_path / "chip"


# Help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_gives_an_example(command: tuple[str, ...]) -> None:
    text = " ".join(done(*command, "--help").split())

    assert "Example: " in text
    assert f"spvtpm {' '.join(command)} " in text


@pytest.mark.parametrize("words", [(), ("sp",), ("hypervisor",), ("guest",)])
def test_an_incomplete_command_shows_what_there_is(words: tuple[str, ...]) -> None:
    assert "Commands" in done(*words)


def test_every_command_is_in_the_list_that_these_tests_go_through() -> None:
    groups = {group.name[0]: group for group in cli.GROUPS}
    found: set[tuple[str, ...]] = {
        (group, name) for group, app in groups.items() for name in app if not name.startswith("-")
    }
    found |= {(command.__name__,) for command in cli.COMMANDS}

    assert found == set(COMMANDS)


# Completion


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vm", "hib"], ["hibernate"]),
        (["vm", "shutdown", "--st"], ["--stay"]),
        (["ch"], ["chips"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
    ids=" ".join,
)
def test_bash_completes_commands_options_and_choices(words: list[str], expected: list[str]) -> None:
    typed = " ".join(f"'{word}'" for word in ("spvtpm", *words))
    program = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _spvtpm; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    script = done("completion", "bash") + program
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert set(expected) <= set(result.stdout.split()), result.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_completion_too(shell: str) -> None:
    assert "hibernate" in done("completion", shell)


# JSON


def test_json_output_parses(sp: RunningSp) -> None:
    status = json.loads(done("sp", "status", "--sp", sp.socket, "--json"))
    assert status["type"] == "Status"
    vm_id = sp.new_vm()
    at = ("--sp", sp.socket, "--json")
    launched = json.loads(done("hypervisor", "launch", str(vm_id), *at))
    assert (launched["vm_id"], launched["state"], launched["boots"]) == (str(vm_id), "running", 1)
    for command, residency in (("park", "parked"), ("wake", "active"), ("reset", "active"), ("stop", "off")):
        assert json.loads(done("hypervisor", command, str(vm_id), *at))["vtpm"]["residency"] == residency
    assert json.loads(done("hypervisor", "start", str(vm_id), *at))["boots"] == 3
    assert json.loads(done("hypervisor", "hibernate", str(vm_id), *at))["state"] == "hibernated"
    assert json.loads(done("hypervisor", "start", str(vm_id), *at))["boots"] == 4
    assert str(vm_id) in {vm["vm_id"] for vm in json.loads(done("hypervisor", "list", *at))}
    bare = str(sp.new_vm())
    assert json.loads(done("hypervisor", "launch", bare, "--without-vtpm", *at))["vtpm"] is None
    emulated = json.loads(done("hypervisor", "launch", str(sp.new_vm()), "--emulator", *at))["vtpm"]
    assert emulated["interface"].endswith(".emulator.sock")
    assert json.loads(done("hypervisor", "create-vtpm", bare, *at))["vtpm"]["residency"] == "active"


def test_a_list_in_a_pipe_is_not_cut_off(sp: RunningSp) -> None:
    vm_id = sp.launch()
    lines = done("hypervisor", "list", "--sp", sp.socket).splitlines()
    at = lines.index(f"{vm_id}  running, boot 1, vTPM active")

    assert lines[at + 1] == f"  {sp.interface(vm_id)}"


def test_status_in_words(sp: RunningSp) -> None:
    assert done("sp", "status", "--sp", sp.socket).startswith("chip ")


# What is wrong with the command line


@pytest.mark.parametrize(
    "words",
    [
        ("bogus",),
        ("hypervisor", "launch", "not-a-uuid", "--sp", "x"),
        ("hypervisor", "launch", "--sp", "x"),
        ("hypervisor", "list", "--sp"),
        ("hypervisor", "list", "--colour", "red", "--sp", "x"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_with_2_and_says_why(words: tuple[str, ...]) -> None:
    result = spvtpm(*words)

    assert result.returncode == 2
    assert "Error" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_a_bad_uuid_is_quoted() -> None:
    assert '"not-a-uuid"' in spvtpm("hypervisor", "start", "not-a-uuid", "--sp", "x").stderr


def test_serve_wants_one_place_to_serve_on(sp: RunningSp) -> None:
    vm_id = sp.launch()
    serve = ["guest", "serve", *guest(sp, vm_id)[2:]]

    assert "either --socket PATH or --tcp HOST:PORT" in complaint(2, *serve)
    assert "is not HOST:PORT" in complaint(2, *serve, "--tcp", "localhost")
    assert "cannot listen" in complaint(4, *serve, "--socket", "/nowhere/at/all")


# What is wrong with the secure processor


def test_no_secure_processor_runs(tmp_path: Path) -> None:
    assert f"no secure processor answers at {tmp_path / 'sp.sock'}" in complaint(
        4, "sp", "status", "--sp", tmp_path / "sp.sock"
    )


def test_a_socket_that_a_dead_secure_processor_left_behind(state_directory: Path) -> None:
    with RunningSp(state_directory) as running:
        running.kill()

        assert "no secure processor answers" in complaint(4, "hypervisor", "list", "--sp", running.socket)


def test_with_json_an_error_is_json_too(tmp_path: Path) -> None:
    result = spvtpm("hypervisor", "list", "--sp", tmp_path / "none.sock", "--json")

    assert result.returncode == 4
    assert not result.stdout
    told = json.loads(result.stderr)
    assert told["error"] == "not-running"
    assert told.keys() == {"error", "message", "hint"}


def test_a_directory_that_is_in_use_for_something_else_stays_as_it_is(tmp_path: Path, chip: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "sp.toml").write_text("mine")

    assert "is not empty" in complaint(3, "sp", "init", state, "--chip", chip)
    assert [path.name for path in state.iterdir()] == ["sp.toml"]
    assert (state / "sp.toml").read_text() == "mine"
    assert chip.exists()


def test_a_path_that_leaves_no_room_for_sockets_is_refused_before_anything_is_made(tmp_path: Path, chip: Path) -> None:
    deep = tmp_path / ("d" * 60)

    assert "there would be no room for sockets" in complaint(3, "sp", "init", deep, "--chip", chip)
    assert not deep.exists()
    assert chip.exists()


def test_a_start_that_fails_ends(tmp_path: Path, chip: Path) -> None:
    state = tmp_path / "state"
    done("sp", "init", state, "--chip", chip)
    (state / "run").write_text("in the way")

    result = spvtpm("sp", "run", state)
    assert result.returncode == 4
    *_log, sentence, _hint = result.stderr.splitlines()  # what the kernel does not give to workers comes before
    assert "cannot use" in sentence


def test_the_state_directory_stands_for_its_socket(sp: RunningSp) -> None:
    assert done("sp", "status", "--sp", sp.state) == done("sp", "status", "--sp", sp.socket)


def test_another_socket_than_the_secure_processors_is_told(sp: RunningSp) -> None:
    vm_id = sp.launch()
    assert "is no secure processor" in complaint(4, "hypervisor", "list", "--sp", sp.interface(vm_id))


def test_output_that_cannot_be_written_is_told(sp: RunningSp) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*SPVTPM, "sp", "status", "--sp", str(sp.socket)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (result.returncode, result.stderr) == (1, "spvtpm: cannot write the output: No space left on device\n")


def test_a_secure_processor_is_made_once_and_takes_its_chip_in(tmp_path: Path, chip: Path) -> None:
    state = tmp_path / "state"
    assert f"spvtpm sp run {state}" in done("sp", "init", state, "--chip", chip)
    before = (state / "fuses" / "chip").read_bytes()

    assert str(chip) in complaint(4, "sp", "init", tmp_path / "another", "--chip", chip)
    assert not (tmp_path / "another").exists()
    put_chip_file(chip)
    assert "there is a secure processor in" in complaint(3, "sp", "init", state, "--chip", chip)
    assert (state / "fuses" / "chip").read_bytes() == before
    assert chip.exists()


def test_a_secure_processor_needs_a_chip(tmp_path: Path, chip: Path) -> None:
    state = tmp_path / "state"
    none = tmp_path / "none"
    none.touch(mode=0o600)
    none.write_bytes(b"{}")

    assert "--chip" in spvtpm("sp", "init", state).stderr
    assert "is damaged, or no chip file" in complaint(4, "sp", "init", state, "--chip", none)
    chip.chmod(0o644)
    assert "can be read by others" in complaint(4, "sp", "init", state, "--chip", chip)
    assert not state.exists()


def test_a_secure_processor_that_cannot_be_made_there(tmp_path: Path, chip: Path) -> None:
    (tmp_path / "file").write_text("")

    assert str(tmp_path / "file") in complaint(4, "sp", "init", tmp_path / "file" / "state", "--chip", chip)
    assert chip.exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--seal-to-tpm", "swtpm:path=/none"),
        ("--pkcs11-module", "/none.so", "--token", "chips", "--pin-file", "/none.pin"),
    ],
    ids=["TPM", "token"],
)
def test_hardware_that_is_not_there_keeps_nothing_and_init_can_be_tried_again(
    tmp_path: Path, chip: Path, options: tuple[str, ...]
) -> None:
    state = tmp_path / "state"

    assert "/none" in complaint(4, "sp", "init", state, "--chip", chip, *options)
    assert chip.exists()
    assert list(state.iterdir()) == []
    done("sp", "init", state, "--chip", chip)


@pytest.mark.parametrize(
    "options",
    [
        ("--seal-to-tpm", "device", "--pcrs", "0,24"),
        ("--seal-to-tpm", "device", "--pcrs", "seven"),
        ("--seal-to-tpm", "device", "--pcrs", ""),
        ("--pkcs11-module", "/none.so", "--token", "chips"),
        ("--token", "chips"),
        ("--pin-file", "/none.pin"),
        ("--seal-to-tpm", "device", "--pkcs11-module", "/none.so", "--token", "chips", "--pin-file", "/none.pin"),
    ],
    ids=" ".join,
)
def test_options_that_name_no_hardware_are_refused(tmp_path: Path, chip: Path, options: tuple[str, ...]) -> None:
    complaint(2, "sp", "init", tmp_path / "state", "--chip", chip, *options)
    assert not (tmp_path / "state").exists()
    assert chip.exists()


def test_a_second_daemon_on_the_same_state(sp: RunningSp) -> None:
    assert f"another process uses {sp.state}" in complaint(4, "sp", "run", sp.state)
    assert sp.info(messages.LaunchVm(vm_id=sp.new_vm())).state == "running"


def test_a_state_directory_that_is_none(tmp_path: Path) -> None:
    assert "is no directory" in complaint(3, "sp", "run", tmp_path / "nothing")
    assert "there is no secure processor in" in complaint(3, "sp", "run", tmp_path)


def test_a_configuration_with_an_unknown_key(tmp_path: Path, chip: Path) -> None:
    state = tmp_path / "state"
    done("sp", "init", state, "--chip", chip)
    (state / "sp.toml").write_text("max_vmz = 3\n")

    assert "max_vmz" in complaint(4, "sp", "run", state)


def test_damaged_fuses(tmp_path: Path, chip: Path) -> None:
    state = tmp_path / "state"
    done("sp", "init", state, "--chip", chip)
    kept = state / "fuses" / "chip"
    kept.write_bytes(kept.read_bytes().replace(b'"chip_id":"', b'"chip_id":"A', 1))

    assert f"the fuses in {state / 'fuses'}: the chip file is damaged" in complaint(4, "sp", "run", state)


# What the hypervisor may not do


def test_commands_that_the_security_block_refuses(sp: RunningSp) -> None:
    at = ("--sp", sp.socket)
    unknown, vm_id = str(uuid.uuid4()), str(sp.launch())

    assert f"there is no VM {unknown}" in complaint(3, "hypervisor", "start", unknown, *at)
    assert "has been launched before" in complaint(3, "hypervisor", "launch", vm_id, *at)
    assert "never been launched" in complaint(3, "hypervisor", "start", str(sp.new_vm()), *at)
    assert "not parked" in complaint(3, "hypervisor", "wake", vm_id, *at)
    complaint(3, "hypervisor", "start", vm_id, *at)
    complaint(3, "hypervisor", "create-vtpm", vm_id, *at)


# What is wrong inside the VM


def test_the_wrong_key(sp: RunningSp, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    create_vm_key(other)

    assert "another VM key" in complaint(5, *guest(sp, sp.launch(), other))


def test_a_key_that_others_can_read(sp: RunningSp) -> None:
    vm_id = sp.launch()
    key = sp.key_file(vm_id)
    key.chmod(0o640)

    assert "can be read by others" in complaint(4, *guest(sp, vm_id, key))


def test_a_key_that_is_missing_or_none(sp: RunningSp, tmp_path: Path) -> None:
    vm_id = sp.launch()
    short = tmp_path / "short.key"
    short.touch(mode=0o600)
    short.write_bytes(b"too short")

    assert "no VM key" in complaint(4, *guest(sp, vm_id, tmp_path / "none.key"))
    assert "is no VM key: it must hold 32 bytes" in complaint(4, *guest(sp, vm_id, short))


def test_a_new_key_never_replaces_one(tmp_path: Path) -> None:
    path = tmp_path / "vm.key"
    assert not done("guest", "new-key", path)
    key = path.read_bytes()

    assert (len(key), path.stat().st_mode & 0o777) == (32, 0o600)
    assert "a key is never replaced" in complaint(3, "guest", "new-key", path)
    assert path.read_bytes() == key


def test_no_interface_is_there(sp: RunningSp, tmp_path: Path) -> None:
    vm_id = sp.launch()
    place = ("--interface", tmp_path / "none.sock", "--key", sp.key_file(vm_id))

    assert "cannot connect to the interface" in complaint(5, "guest", "tcti", *place)


def test_the_interface_of_a_stopped_vm(sp: RunningSp) -> None:
    vm_id = sp.launch()
    sp.call(messages.StopVm(vm_id=vm_id))

    assert "cannot connect to the interface" in complaint(5, *guest(sp, vm_id))


def test_an_interface_that_another_process_holds(sp: RunningSp) -> None:
    vm_id = sp.launch()
    # The same command, less patient.
    impatient = (
        "import sys; from spvtpm import cli; from spvtpm.guest.memory import InterfaceMemory as memory;"
        "memory.connect.__func__.__defaults__ = (0.3,); sys.argv[0] = 'spvtpm'; cli.main()"
    )
    with sp.driver(vm_id):
        command = [sys.executable, "-c", impatient, *map(str, guest(sp, vm_id))]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    assert result.returncode == 4
    assert result.stderr.startswith(f"spvtpm: another process holds the interface {sp.interface(vm_id)}")
    assert "Traceback" not in result.stderr


def test_bytes_that_are_no_tpm_command(sp: RunningSp) -> None:
    result = spvtpm(*guest(sp, sp.launch()), stdin=b"GET / HTTP/1.1\r\n\r\n")

    assert result.returncode == 5
    assert "a TPM command announces" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_pipe_that_is_closed_early_ends_quietly(sp: RunningSp) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*SPVTPM, "hypervisor", "list", "--sp", str(sp.socket)]
    with os.fdopen(writer, "wb") as broken:
        result = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, timeout=60)

    assert b"Traceback" not in result.stderr


# The vendor


def test_a_vendor_makes_and_revokes_chips(tmp_path: Path) -> None:
    vendor = tmp_path / "vendor"
    assert "made in" in done("vendor", "init", vendor, "--name", "Example Silicon")
    made = json.loads(done("vendor", "manufacture", vendor, tmp_path / "chip", "--json"))
    assert (tmp_path / "chip").stat().st_mode & 0o777 == 0o600
    assert "exists already" in complaint(3, "vendor", "manufacture", vendor, tmp_path / "chip")
    assert "revocation list 2" in done("vendor", "revoke", vendor, made["chip_id"])
    assert "revocation list 3" in done("vendor", "refresh-list", vendor)
    assert done("vendor", "raise-generation", vendor) == "generation 2\n"
    assert "no chip" in complaint(3, "vendor", "revoke", vendor, "00" * 16)
    assert "is no chip id" in complaint(2, "vendor", "revoke", vendor, "xyz")
    assert "exists already" in complaint(3, "vendor", "init", vendor, "--name", "Another")


def test_a_machine_without_an_interface_gets_no_tpm(tmp_path: Path) -> None:
    key = tmp_path / "vm.key"
    create_vm_key(key)
    result = spvtpm("guest", "device", "--key", key)
    assert result.returncode == 5
    assert "this machine has no vTPM interface" in result.stderr
