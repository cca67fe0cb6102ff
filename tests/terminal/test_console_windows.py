"""Whoever takes late, command or owner, has all in the end, and nobody between is kept waiting; who sends too much is refused."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spvtpm.guest.frame_stream import FrameStream
from spvtpm.terminal.console import Write, run_command
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.console import (
    MAX_CONSOLE_MESSAGE_BYTES,
    PIECE_BYTES,
    WINDOW_PIECES,
    ConsoleReply,
    ConsoleRequest,
    Ended,
    Input,
    Output,
    Run,
    Taken,
    build_console_certificate,
    console_key,
    encode_console_message,
    parse_console_request,
)
from spvtpm.wire.errors import ChannelError, MessageError
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES, Introduce, encode_clear, parse_clear
from tests.papers import der
from tests.relay import Relay
from tests.terminal.estate import VM_KEY
from tests.terminal.test_console import VM, vm

TAKE_S = 0.2
"""How long the relays here wait for a side that takes nothing; what is in the way of a window holds less than a quarter of it."""

OPENING_FRAMES = 3
"""Of the owner: an introduction, two of the handshake. Of the VM: as many at most."""

PIECE = bytes(PIECE_BYTES)


@contextmanager
def fed(pieces: Sequence[bytes]) -> Iterator[int]:
    """The end of a pipe from which they can be read, written one by one."""
    source, sink = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), os.fdopen(sink, "wb", buffering=0) as file:
            for piece in pieces:
                file.write(piece)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield source
    finally:
        await_threads_ended()
        os.close(source)
        feeder.join(30)
        assert not feeder.is_alive()


def await_threads_ended() -> None:
    """Of the owner's end: the one that feeds, the one that listens."""
    for thread in threading.enumerate():
        if thread.name in ("console-input", "console-output"):
            thread.join(30)
            assert not thread.is_alive(), thread.name


def run(path: Path, *arguments: str, write: Write, read_from: int | None = None) -> int:
    return run_command(through_socket(path), VM_KEY, VM, arguments, write, read_from, 30)


@contextmanager
def impatient(directory: Path) -> Iterator[Relay]:
    """The way to a VM, through somebody who carries nothing for a side that takes nothing."""
    with vm(directory / "vm") as path, Relay(directory / "relay", path, take_s=TAKE_S) as relay:
        yield relay


def test_a_command_that_reads_late_is_given_all(tmp_path: Path) -> None:
    written = bytearray()
    with impatient(tmp_path) as relay, fed([PIECE] * (3 * WINDOW_PIECES)) as source:
        wait = tmp_path / "vm-memory" / "wait"
        os.mkfifo(wait)

        def let_it_read() -> None:
            relay.await_frames("owner", OPENING_FRAMES + 1 + WINDOW_PIECES)
            wait.write_bytes(b"")

        late = threading.Thread(target=let_it_read)
        late.start()
        code = run(
            relay.path, "sh", "-c", "cat wait; wc -c", write=lambda _to, data: written.extend(data), read_from=source
        )
        late.join()
    assert (code, bytes(written)) == (0, b"%d\n" % (3 * WINDOW_PIECES * PIECE_BYTES))


def test_an_owner_who_takes_late_is_given_all(tmp_path: Path) -> None:
    size = 3 * WINDOW_PIECES * PIECE_BYTES
    taken = 0
    with impatient(tmp_path) as relay:

        def write(_to: object, data: bytes) -> None:
            nonlocal taken
            if not taken:  # as somebody who looks at the first page
                relay.await_frames("sp", WINDOW_PIECES)
            taken += len(data)

        code = run(relay.path, "head", "-c", str(size), "/dev/zero", write=write)
    assert (code, taken) == (0, size)


def test_an_owner_who_takes_late_has_the_last_words_of_a_command_that_has_ended(tmp_path: Path) -> None:
    written = bytearray()
    with impatient(tmp_path) as relay:
        memory = tmp_path / "vm-memory"

        def write(_to: object, data: bytes) -> None:
            if not written:
                (memory / "go").read_bytes()  # until the command has written all that it has, and ends
            written.extend(data)

        os.mkfifo(memory / "go")
        script = f"head -c {8 * PIECE_BYTES} /dev/zero; echo last; : > go"
        code = run(relay.path, "sh", "-c", script, write=write)
    assert (code, bytes(written)) == (0, bytes(8 * PIECE_BYTES) + b"last\n")


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 6 * PIECE_BYTES), max_size=25), seed=st.integers(0, 2**32))
def test_whatever_goes_both_ways_arrives_whole(sizes: list[int], seed: int) -> None:
    said = [Random(seed + number).randbytes(size) for number, size in enumerate(sizes)]  # noqa: S311  # no secret
    written = {"stdout": bytearray(), "stderr": bytearray()}
    with TemporaryDirectory(prefix="spvtpm-") as directory, impatient(Path(directory)) as relay, fed(said) as source:
        code = run(
            relay.path,
            "tee",
            "/dev/stderr",
            write=lambda to, data: written[to].extend(data),
            read_from=source,
        )
    whole = b"".join(said)
    assert code == 0
    assert written["stdout"] == whole
    assert written["stderr"] == whole


# Who only pretends


class VmsEnd:
    """The VM's end of one console, that says exactly what it is told to."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = FrameStream(connection, MAX_CHANNEL_FRAME_BYTES)
        said = parse_clear(self._frame())
        assert isinstance(said, Introduce)
        key = console_key(VM_KEY, VM, "vm")
        certificate = build_console_certificate(key)
        self._stream.send(encode_clear(Introduce(der(certificate))))
        size = MAX_CONSOLE_MESSAGE_BYTES
        self._channel = SecureChannel(key, certificate, said.certificate, is_server=True, max_message_bytes=size)
        self._messages: list[bytes] = []
        while not self._channel.is_open:
            self._messages += self._channel.receive(self._frame())
            self._stream.send(*self._channel.frames())
        assert isinstance(self.hear(), Run)

    def _frame(self) -> bytes:
        frame = self._stream.receive(None)
        assert frame is not None
        return frame

    def hear(self) -> ConsoleRequest:
        """The next request."""
        while not self._messages:
            self._messages += self._channel.receive(self._frame())
        return parse_console_request(self._messages.pop(0))

    def say(self, *replies: ConsoleReply) -> None:
        """One after the other."""
        for reply in replies:
            self._channel.send(encode_console_message(reply))
            self._stream.send(*self._channel.frames())


@contextmanager
def pretended(path: Path, talk: Callable[[VmsEnd], None]) -> Iterator[Path]:
    """A console of a VM that does as a test says; what it asserts is asserted."""
    errors: list[BaseException] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _address = listener.accept()
            with connection:
                try:
                    talk(VmsEnd(connection))
                except BaseException as error:
                    errors.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            thread.join(30)
    assert errors == []


def heard_until_he_hangs_up(end: VmsEnd) -> list[str]:
    """The kinds of what is said before, without what is taken."""
    kinds: list[str] = []
    with suppress(ChannelError):
        while True:
            kinds.append(type(end.hear()).__name__)
    return [kind for kind in kinds if kind != "Taken"]


OUTPUT = Output(stream="stdout", data=PIECE)


def test_an_owner_takes_a_window_from_a_vm_that_waits_for_nothing(tmp_path: Path) -> None:
    taken: list[bytes] = []

    def talk(end: VmsEnd) -> None:
        end.say(*[OUTPUT] * WINDOW_PIECES, Ended(code=0))

    with pretended(tmp_path / "vm", talk) as path:
        assert run(path, "true", write=lambda _to, data: taken.append(data)) == 0
    assert taken == [PIECE] * WINDOW_PIECES


@pytest.mark.attack("A23")
def test_a_vm_that_sends_more_than_a_window_is_refused(tmp_path: Path) -> None:
    taken = 0

    def talk(end: VmsEnd) -> None:
        end.say(*[OUTPUT] * (WINDOW_PIECES + 1))
        assert heard_until_he_hangs_up(end) == ["EndOfInput"]

    def write(_to: object, _data: bytes) -> None:
        nonlocal taken
        await_threads_ended()  # it is not heard any more, though this here takes as long as it likes
        taken += 1

    with pretended(tmp_path / "vm", talk) as path, pytest.raises(MessageError):
        run(path, "true", write=write)
    assert taken <= WINDOW_PIECES


@pytest.mark.attack("A25")
def test_a_vm_that_has_taken_more_than_it_was_sent_is_refused(tmp_path: Path) -> None:
    def talk(end: VmsEnd) -> None:
        end.say(Taken(pieces=1))
        assert heard_until_he_hangs_up(end) == ["EndOfInput"]

    with pretended(tmp_path / "vm", talk) as path, pytest.raises(MessageError):
        run(path, "true", write=lambda *_: None)


def test_an_owner_sends_no_more_than_a_window_to_a_command_that_does_not_read(tmp_path: Path) -> None:
    def talk(end: VmsEnd) -> None:
        assert {type(end.hear()) for _ in range(WINDOW_PIECES)} == {Input}
        end.say(Taken(pieces=2))
        assert {type(end.hear()) for _ in range(2)} == {Input}
        end.say(Ended(code=3))
        assert heard_until_he_hangs_up(end) == []

    with pretended(tmp_path / "vm", talk) as path, fed([PIECE] * (2 * WINDOW_PIECES)) as source:
        assert run(path, "true", write=lambda *_: None, read_from=source) == 3


def test_the_end_of_a_commands_input_waits_for_no_room(tmp_path: Path) -> None:
    def talk(end: VmsEnd) -> None:
        requests = [type(end.hear()).__name__ for _ in range(WINDOW_PIECES + 1)]
        assert requests == ["Input"] * WINDOW_PIECES + ["EndOfInput"]
        end.say(Ended(code=0))

    with pretended(tmp_path / "vm", talk) as path, fed([PIECE] * WINDOW_PIECES) as source:
        assert run(path, "true", write=lambda *_: None, read_from=source) == 0


@pytest.mark.parametrize("reason", [KeyboardInterrupt, BrokenPipeError])
def test_an_owner_who_leaves_while_his_input_waits_for_room_leaves_nothing_behind(
    tmp_path: Path, reason: type[BaseException]
) -> None:
    def talk(end: VmsEnd) -> None:
        assert {type(end.hear()) for _ in range(WINDOW_PIECES)} == {Input}
        end.say(OUTPUT)
        assert heard_until_he_hangs_up(end) == []

    def write(*_: object) -> None:
        raise reason

    with pretended(tmp_path / "vm", talk) as path, fed([PIECE] * (2 * WINDOW_PIECES)) as source:
        with pytest.raises(reason):
            run(path, "true", write=write, read_from=source)
        await_threads_ended()
