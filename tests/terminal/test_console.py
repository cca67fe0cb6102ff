"""The owner's end of a VM's console against the VM's own end, and against who only pretends to be it."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from spvtpm.guest.commands import Commands
from spvtpm.guest.console_server import Console
from spvtpm.terminal.console import run_command
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire.console import Run, build_console_certificate, console_key, encode_console_message
from spvtpm.wire.errors import CertificateError, ChannelError, SpvtpmError, UntrustedIssuer, UsageError
from spvtpm.wire.introductions import Introduce, encode_clear
from tests.papers import der
from tests.relay import Relay, Side
from tests.terminal.estate import VM_KEY

VM = uuid.UUID(int=7)


@contextmanager
def vm(path: Path, vm_key: bytes = VM_KEY, vm_id: uuid.UUID = VM) -> Iterator[Path]:
    """A VM's console on a socket."""
    memory = path.with_name(f"{path.name}-memory")
    memory.mkdir()
    commands = Commands(memory, "")
    console = Console(vm_key, vm_id, commands)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    console.serve(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield path
    finally:
        commands.end_all()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)
        listener.close()


class Ran:
    """One command, and what it wrote."""

    def __init__(self, path: Path, *arguments: str, given: bytes | None = None, vm_key: bytes = VM_KEY) -> None:
        self.stdout, self.stderr = b"", b""
        read_from = None
        if given is not None:
            read_from, write_to = os.pipe()
            feeder = threading.Thread(target=self._feed, args=(write_to, given))
            feeder.start()
        try:
            self.code = run_command(through_socket(path), vm_key, VM, arguments, self._write, read_from, 20)
        finally:
            if read_from is not None:
                os.close(read_from)
                feeder.join(20)

    @staticmethod
    def _feed(write_to: int, given: bytes) -> None:
        with os.fdopen(write_to, "wb") as file, suppress(BrokenPipeError):
            file.write(given)

    def _write(self, stream: str, data: bytes) -> None:
        setattr(self, stream, getattr(self, stream) + data)


def test_a_command_reads_writes_and_ends_with_its_own_code(tmp_path: Path) -> None:
    with vm(tmp_path / "vm") as path:
        ran = Ran(path, "sh", "-c", "cat; echo bad >&2; exit 7", given=b"good")
        assert (ran.code, ran.stdout, ran.stderr) == (7, b"good", b"bad\n")
        assert Ran(path, "cat").code == 0  # nothing to read is the end of it
        assert Ran(path, "no-such-program").code == 127


def test_much_goes_both_ways_at_once(tmp_path: Path) -> None:
    given = os.urandom(4 << 20)
    with vm(tmp_path / "vm") as path:
        assert Ran(path, "cat", given=given).stdout == given


def test_words_that_no_command_can_be_told_are_refused_here(tmp_path: Path) -> None:
    for words in ((), ("a\0b",), ("a" * 5000,), ("a",) * 257):
        with pytest.raises(UsageError):
            Ran(tmp_path / "nobody", *words)


@pytest.mark.attack("A10")
def test_another_vms_console_behind_the_name_of_this_one_hears_nothing(tmp_path: Path) -> None:
    for name, vm_key, vm_id in (("key", bytes(32), VM), ("vm", VM_KEY, uuid.uuid4())):
        with vm(tmp_path / name, vm_key, vm_id) as path, Relay(tmp_path / f"{name}.relay", path) as relay:
            with pytest.raises(SpvtpmError):
                Ran(relay.path, "echo", "secret words")
            assert len(relay.frames("owner")) == 1  # the introduction alone


@pytest.mark.attack("A10")
def test_who_shows_a_certificate_of_another_key_is_refused(tmp_path: Path) -> None:
    impostor = encode_clear(Introduce(der(build_console_certificate(console_key(bytes(32), VM, "vm")))))
    with Relay(tmp_path / "other", None, lambda *_: [impostor]), pytest.raises(UntrustedIssuer):
        Ran(tmp_path / "other", "true")
    nonsense = encode_clear(Introduce(b"no certificate"))
    with Relay(tmp_path / "none", None, lambda *_: [nonsense]), pytest.raises(CertificateError):
        Ran(tmp_path / "none", "true")


@pytest.mark.attack("A02")
@pytest.mark.parametrize(("side", "at"), [("owner", 1), ("owner", 2), ("sp", 1), ("sp", 2)])
def test_an_altered_frame_ends_the_console(tmp_path: Path, side: Side, at: int) -> None:
    def hook(sender: Side, number: int, frame: bytes) -> list[bytes]:
        return [frame[:-1] + bytes([frame[-1] ^ 1])] if (sender, number) == (side, at) else [frame]

    with vm(tmp_path / "vm") as path, Relay(tmp_path / "relay", path, hook) as relay, pytest.raises(ChannelError):
        Ran(relay.path, "sh", "-c", "echo a; read b; echo c", given=b"b\n")


@pytest.mark.attack("A24")
def test_what_is_typed_is_nowhere_on_the_way(tmp_path: Path) -> None:
    with vm(tmp_path / "vm") as path, Relay(tmp_path / "relay", path) as relay:
        assert b"secret words" in encode_console_message(Run(arguments=("echo", "secret words")))
        assert Ran(relay.path, "echo", "secret words").stdout == b"secret words\n"
        seen = b"".join(frame for _side, frame in relay.seen)
    assert b"secret words" not in seen and VM_KEY not in seen
