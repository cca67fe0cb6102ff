"""A VM's console: whoever has the VM key has a command run in it, and nobody else; what is between can only end it."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.terminal.console import run_command
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.console import (
    MAX_CONSOLE_MESSAGE_BYTES,
    PIECE_BYTES,
    WINDOW_PIECES,
    ConsoleReply,
    ConsoleRequest,
    End,
    Ended,
    EndOfInput,
    Input,
    Output,
    Run,
    Taken,
    console_key,
    encode_console_message,
    parse_console_reply,
)
from spvtpm.wire.errors import ChannelError, SpvtpmError, UntrustedIssuer
from spvtpm.wire.framing import FrameDecoder, encode_frame
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES, Introduce, Knock, encode_clear, parse_clear
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.owner_certificates import build_owner_certificate
from tests.guest.running_machine import PATIENCE_S, RunningMachine, ended
from tests.harness import RunningSp
from tests.relay import Relay, Side

SECRET = "a-secret-that-is-said-on-the-console"
ENDS: tuple[End, ...] = ("owner", "vm")


@pytest.fixture(scope="module")
def machine() -> Iterator[RunningMachine]:
    """An emulated VM that all tests here have in common: no test can harm it."""
    with (
        TemporaryDirectory(prefix="spvtpm-") as directory,
        RunningSp(Path(directory) / "sp") as sp,
        RunningMachine(sp) as machine,
    ):
        machine.begin()
        yield machine


@pytest.fixture
def relay(machine: RunningMachine, tmp_path: Path) -> Iterator[Relay]:
    """Whoever carries frames to the console."""
    with Relay(tmp_path / "relay", machine.directory / "console.sock") as relay:
        yield relay


def run_through(relay: Relay, machine: RunningMachine, *arguments: str) -> tuple[int, bytes]:
    written: list[bytes] = []
    way = through_socket(relay.path)
    code = run_command(
        way, machine.key, machine.vm_id, arguments, lambda _stream, data: written.append(data), None, PATIENCE_S
    )
    return code, b"".join(written)


class OwnersEnd:
    """The owner's end of a console, that says exactly what it is told to.

    Args:
        machine: the VM.
        key: of this end; None: the right one.
    """

    def __init__(self, machine: RunningMachine, key: ec.EllipticCurvePrivateKey | None = None) -> None:
        self.machine = machine
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(str(machine.directory / "console.sock"))
        self._decoder, self._frames, self._messages = (
            FrameDecoder(MAX_CHANNEL_FRAME_BYTES),
            list[bytes](),
            list[bytes](),
        )
        self._key = key or console_key(machine.key, machine.vm_id, "owner")

    def frame(self) -> bytes:
        """The next one."""
        while not self._frames:
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def say_frames(self, *frames: bytes) -> None:
        """Sends frames as they are."""
        with suppress(BrokenPipeError):  # whoever was turned away can still read why
            for frame in frames:
                self.socket.sendall(encode_frame(frame))

    def introduce(self) -> None:
        """Both ends have said who they are."""
        certificate = build_owner_certificate(self._key)
        self.say_frames(encode_clear(Introduce(certificate.public_bytes(Encoding.DER))))
        said = parse_clear(self.frame())
        assert isinstance(said, Introduce), said
        self.channel = SecureChannel(
            self._key, certificate, said.certificate, is_server=False, max_message_bytes=MAX_CONSOLE_MESSAGE_BYTES
        )
        self.say_frames(*self.channel.frames())

    def open(self, *first: ConsoleRequest) -> None:
        """Shakes hands; the last frame of that carries the first requests with it."""
        self.introduce()
        while not self.channel.is_open:
            self.channel.receive(self.frame())
        for request in first:
            self.channel.send(encode_console_message(request))
        self.say_frames(b"".join(self.channel.frames()))

    def say(self, *requests: ConsoleRequest) -> None:
        """Requests, each in frames of its own."""
        for request in requests:
            self.say_bytes(encode_console_message(request))

    def say_bytes(self, message: bytes) -> None:
        """What is perhaps no message."""
        self.channel.send(message)
        self.say_frames(*self.channel.frames())

    def hear(self) -> ConsoleReply:
        """The next reply."""
        while not self._messages:
            self._messages += self.channel.receive(self.frame())
        return parse_console_reply(self._messages.pop(0))

    def hear_more(self) -> ConsoleReply:
        """The next reply that is not about what the command has read."""
        while isinstance(reply := self.hear(), Taken):
            pass
        return reply

    def close(self) -> None:
        """Hangs up."""
        self.socket.close()


@pytest.fixture
def end(machine: RunningMachine) -> Iterator[OwnersEnd]:
    """Connected, and silent."""
    with closing(OwnersEnd(machine)) as end:
        yield end


def test_a_command_has_its_output_its_errors_and_its_exit_code(machine: RunningMachine) -> None:
    assert machine.run("sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")


def test_a_command_runs_in_the_vms_memory_with_nothing_of_the_hosts_environment(machine: RunningMachine) -> None:
    out = machine.shell("pwd; env -u PWD -u OLDPWD -u SHLVL -u _ | sort").decode().splitlines()
    assert out[0] == str(machine.memory)
    assert [line.partition("=")[0] for line in out[1:]] == ["HOME", "LANG", "PATH", "TPM2TOOLS_TCTI"]
    assert f"TPM2TOOLS_TCTI=swtpm:path={machine.directory}/tpm" in out


def test_words_are_passed_as_they_are(machine: RunningMachine) -> None:
    words = ("a b", "", "$HOME", "; exit 1", "Gr\u00fc\u00dfe", "-n")
    assert machine.run("printf", "%s|", *words)[1].decode() == "".join(f"{word}|" for word in words)


def test_a_command_reads_what_it_is_given_to_its_end(machine: RunningMachine) -> None:
    given = os.urandom(3 * PIECE_BYTES + 17)
    assert machine.run("cat", given=given) == (0, given, b"")


def test_a_command_that_reads_nothing_of_what_it_is_given_ends(machine: RunningMachine) -> None:
    assert machine.run("sh", "-c", "exec 0<&-; echo done", given=bytes(100 * PIECE_BYTES))[:2] == (0, b"done\n")


def test_much_output_arrives_whole_at_an_owner_who_takes_his_time(machine: RunningMachine, end: OwnersEnd) -> None:
    end.open()
    end.say(Run(arguments=("head", "-c", "5000000", "/dev/zero")), EndOfInput())
    other = machine.run("echo", "meanwhile")  # it waits for nobody
    assert other == (0, b"meanwhile\n", b"")
    size = 0
    while isinstance(reply := end.hear(), Output):
        size += len(reply.data)
        end.say(Taken(pieces=1))
    assert (size, reply) == (5_000_000, Ended(code=0))


def test_no_more_than_a_window_is_on_its_way_to_an_owner_who_takes_nothing(end: OwnersEnd) -> None:
    end.open()
    end.say(Run(arguments=("cat", "/dev/zero")))
    assert {type(end.hear()) for _ in range(WINDOW_PIECES)} == {Output}
    end.say(Taken(pieces=3))
    assert {type(end.hear()) for _ in range(3)} == {Output}
    end.say_bytes(b"\0")
    assert isinstance(end.hear(), ErrorReply)  # nothing was between


def test_a_command_that_reads_late_reads_all_of_a_window(end: OwnersEnd) -> None:
    """Nobody between is kept waiting meanwhile: the VM takes it, and hears the owner."""
    end.open()
    end.say(Run(arguments=("sh", "-c", "mkfifo wait; echo ready; cat wait; rm wait; wc -c")))
    assert end.hear() == Output(stream="stdout", data=b"ready\n")
    end.say(*[Input(data=bytes(PIECE_BYTES))] * WINDOW_PIECES, EndOfInput())
    with closing(OwnersEnd(end.machine)) as other:
        other.open(Run(arguments=("sh", "-c", "echo now > wait")), EndOfInput())
        assert other.hear() == Ended(code=0)
    assert end.hear() == Output(stream="stdout", data=b"now\n")
    taken = 0
    while isinstance(reply := end.hear(), Taken):
        taken += reply.pieces
    assert reply == Output(stream="stdout", data=b"%d\n" % (WINDOW_PIECES * PIECE_BYTES))
    assert WINDOW_PIECES * 3 // 4 <= taken <= WINDOW_PIECES
    assert end.hear() == Ended(code=0)


def test_what_waits_for_room_when_its_command_ends_is_sent_all_the_same(end: OwnersEnd) -> None:
    end.open()
    end.say(Run(arguments=("sh", "-c", "while printf x; do read -r line || exit 0; done")))
    said = Output(stream="stdout", data=b"x")
    for _ in range(WINDOW_PIECES):
        assert end.hear_more() == said
        end.say(Input(data=b"\n"))
    end.say(EndOfInput())
    end.say(Taken(pieces=WINDOW_PIECES))
    assert (end.hear_more(), end.hear_more()) == (said, Ended(code=0))


def test_much_on_either_stream_keeps_the_other_from_nothing(machine: RunningMachine) -> None:
    size = 2 * WINDOW_PIECES * PIECE_BYTES
    first = machine.run("sh", "-c", f"head -c {size} /dev/zero >&2; head -c {size} /dev/zero")
    assert first == (0, bytes(size), bytes(size))
    at_once = machine.run("sh", "-c", f"head -c {size} /dev/zero >&2 & head -c {size} /dev/zero; wait")
    assert at_once == (0, bytes(size), bytes(size))


@pytest.mark.parametrize(
    ("script", "code"), [("kill -9 $$", 137), ("kill -TERM $$", 143), ("exit 255", 255)], ids=["9", "15", "255"]
)
def test_exit_codes_are_as_shells_have_them(machine: RunningMachine, script: str, code: int) -> None:
    assert machine.run("sh", "-c", script)[0] == code


@pytest.mark.parametrize(("program", "code"), [("no-such-program", 127), ("/", 126), ("./plain", 126)])
def test_what_cannot_be_run_is_told_as_shells_tell_it(machine: RunningMachine, program: str, code: int) -> None:
    machine.shell("touch plain")
    got, out, err = machine.run(program)
    assert (got, out) == (code, b"")
    assert err.startswith(program.encode())


def test_a_command_that_leaves_something_behind_ends_all_the_same(machine: RunningMachine) -> None:
    code, out, _err = machine.run("sh", "-c", "setsid sleep 1000 & echo $!")  # it holds the pipes open
    assert code == 0
    os.kill(int(out), 9)


def test_a_request_that_comes_with_the_last_frame_of_the_handshake_is_heard(end: OwnersEnd) -> None:
    end.open(Run(arguments=("echo", "early")), EndOfInput())
    assert end.hear() == Output(stream="stdout", data=b"early\n")
    assert end.hear() == Ended(code=0)


def test_words_that_come_after_the_end_of_a_command_take_none_of_its_output_away(end: OwnersEnd) -> None:
    end.open(Run(arguments=("echo", "early")))
    poll = select.poll()
    poll.register(end.socket, select.POLLRDHUP)
    assert poll.poll(PATIENCE_S * 1000)  # all is said, and nothing of it heard
    end.channel.send(encode_console_message(EndOfInput()))
    for frame in end.channel.frames():
        end.socket.sendall(encode_frame(frame))  # whoever carries frames would drop the rest if this were refused
    assert end.hear() == Output(stream="stdout", data=b"early\n")
    assert end.hear() == Ended(code=0)


def test_whoever_hangs_up_ends_his_command(machine: RunningMachine, end: OwnersEnd) -> None:
    end.open()
    end.say(Run(arguments=("sh", "-c", "echo $$; sleep 1000 & echo $!; wait")))
    written = b""
    while written.count(b"\n") < 2:
        reply = end.hear()
        assert isinstance(reply, Output)
        written += reply.data
    end.close()
    assert ended([int(pid) for pid in written.split()])


def test_whoever_hangs_up_while_his_command_does_not_read_ends_it(machine: RunningMachine, end: OwnersEnd) -> None:
    end.open()
    end.say(Run(arguments=("sh", "-c", "echo $$; exec sleep 1000")))
    reply = end.hear()
    assert isinstance(reply, Output)
    end.say(*[Input(data=bytes(PIECE_BYTES))] * WINDOW_PIECES)
    end.close()
    assert ended([int(reply.data)])


def test_whoever_hangs_up_while_he_takes_nothing_ends_his_command(machine: RunningMachine, end: OwnersEnd) -> None:
    end.open()
    end.say(Run(arguments=("sh", "-c", "echo $$; exec cat /dev/zero")))
    first, *_others = [end.hear() for _ in range(WINDOW_PIECES)]
    assert isinstance(first, Output)
    end.close()
    assert ended([int(first.data.partition(b"\n")[0])])


@pytest.mark.attack("A23")
def test_an_owner_who_sends_more_than_a_window_is_refused_and_his_command_ended(end: OwnersEnd) -> None:
    end.open()
    end.say(Run(arguments=("sh", "-c", "echo $$; exec sleep 1000")))
    reply = end.hear()
    assert isinstance(reply, Output)
    end.say(
        *[Input(data=bytes(PIECE_BYTES))] * (WINDOW_PIECES + 1)
    )  # what a pipe holds of it, is told as taken with more
    refused = end.hear()
    assert isinstance(refused, ErrorReply) and refused.code == "bad-message"
    assert ended([int(reply.data)])


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "message",
    [
        b"\0",
        b"\2" + encode_console_message(EndOfInput())[1:],
        encode_console_message(EndOfInput()),
        encode_console_message(Run(arguments=("true",)))[:-1],
        encode_console_message(Run(arguments=())),
        encode_console_message(Run(arguments=("a\0b",))),
        encode_console_message(Run(arguments=("x",) * 257)),
    ],
    ids=["noise", "version", "no Run", "cut", "no words", "NUL", "too many words"],
)
def test_what_is_no_beginning_of_a_console_is_refused(end: OwnersEnd, message: bytes) -> None:
    end.open()
    end.say_bytes(message)
    reply = end.hear()
    assert isinstance(reply, ErrorReply) and reply.code == "bad-message"


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "messages",
    [
        [encode_console_message(Run(arguments=("true",)))],
        [b"\0"],
        [encode_console_message(Input(data=b""))],
        [encode_console_message(EndOfInput()), encode_console_message(Input(data=b"more"))],
        [encode_console_message(EndOfInput())] * 2,
        [encode_console_message(Taken(pieces=2))],
        [encode_console_message(Taken(pieces=1))] * 2,
        [encode_console_message(Taken(pieces=0))],
        [encode_console_message(Taken(pieces=WINDOW_PIECES + 1))],
    ],
    ids=[
        *("Run again", "noise", "an empty piece", "input after its end", "its end again"),
        *("more taken than sent", "taken twice", "nothing taken", "more than a window taken"),
    ],
)
def test_nonsense_after_the_beginning_ends_the_command(end: OwnersEnd, messages: list[bytes]) -> None:
    end.open()
    end.say(Run(arguments=("sh", "-c", "echo $$; exec sleep 1000")))
    reply = end.hear()
    assert isinstance(reply, Output)
    for message in messages:
        end.say_bytes(message)
    refused = end.hear()
    assert isinstance(refused, ErrorReply) and refused.code == "bad-message"
    assert ended([int(reply.data)])


@pytest.mark.attack("A25")
def test_a_message_that_is_too_long_is_refused(end: OwnersEnd) -> None:
    end.open()
    end.say_bytes(bytes(MAX_CONSOLE_MESSAGE_BYTES + 1))
    reply = end.hear()
    assert isinstance(reply, ErrorReply) and reply.code == "bad-frame"


def has_room(machine: RunningMachine) -> bool:
    """Waits until consoles that were hung up are closed at the other end, too."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(SpvtpmError):
            return machine.run("true")[0] == 0
    return False


@pytest.mark.attack("A23")
def test_only_so_many_consoles_are_open_at_a_time(machine: RunningMachine) -> None:
    ends = [OwnersEnd(machine) for _ in range(17)]
    try:
        for end in ends[:16]:
            end.introduce()
        with pytest.raises(ConnectionResetError):
            ends[16].introduce()
    finally:
        for end in ends:
            end.close()
    assert has_room(machine)


# Who may come


@pytest.mark.attack("A04")
def test_whoever_does_not_have_the_vm_key_is_refused_before_tls(machine: RunningMachine) -> None:
    with closing(OwnersEnd(machine, ec.generate_private_key(ec.SECP384R1()))) as end:
        certificate = build_owner_certificate(end._key)
        end.say_frames(encode_clear(Introduce(certificate.public_bytes(Encoding.DER))))
        said = parse_clear(end.frame())
    assert isinstance(said, ErrorReply) and said.code == "certificate-refused"


@pytest.mark.attack("A04")
def test_whoever_shows_the_owners_certificate_without_its_key_gets_no_channel(machine: RunningMachine) -> None:
    """The certificate is no secret: whoever carries the introductions has seen it."""
    with closing(OwnersEnd(machine)) as end:
        shown = build_owner_certificate(end._key).public_bytes(Encoding.DER)
        end.say_frames(encode_clear(Introduce(shown)))
        said = parse_clear(end.frame())
        assert isinstance(said, Introduce)
        mine = ec.generate_private_key(ec.SECP384R1())
        channel = SecureChannel(
            mine, build_owner_certificate(mine), said.certificate, is_server=False, max_message_bytes=100
        )
        end.say_frames(*channel.frames())
        with pytest.raises((ConnectionError, ChannelError)):
            while True:
                channel.receive(end.frame())
                end.say_frames(*channel.frames())
    assert machine.state() == "running"


@pytest.mark.attack("A04")
def test_an_owner_with_another_key_is_refused_and_the_vm_runs_on(machine: RunningMachine) -> None:
    with pytest.raises(SpvtpmError):
        machine.run("true", key=os.urandom(32))
    assert machine.run("true")[0] == 0


@pytest.mark.attack("A04")
def test_whoever_answers_in_the_vms_place_is_told_nothing(machine: RunningMachine, tmp_path: Path) -> None:
    """A platform that has made up a VM of its own."""
    own = build_owner_certificate(ec.generate_private_key(ec.SECP384R1())).public_bytes(Encoding.DER)
    with (
        Relay(tmp_path / "relay", None, lambda _side, _number, _frame: [encode_clear(Introduce(own))]) as relay,
        pytest.raises(UntrustedIssuer),
    ):
        run_through(relay, machine, "echo", SECRET)
    assert all(SECRET.encode() not in frame for _side, frame in relay.seen)


@pytest.mark.attack("A25")
@pytest.mark.parametrize("said", [b"\0", encode_clear(Knock()), encode_clear(Introduce(b"no certificate"))])
def test_what_is_no_introduction_is_refused_in_clear(end: OwnersEnd, said: bytes) -> None:
    end.say_frames(said)
    assert isinstance(parse_clear(end.frame()), ErrorReply)


def test_the_keys_of_a_console_are_those_of_its_specification() -> None:
    """As docs/formats/console.md has them."""
    vm_key, vm_id = bytes(range(32)), uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
    numbers = {which: f"{console_key(vm_key, vm_id, which).private_numbers().private_value:096x}" for which in ENDS}
    page = (Path(__file__).parent.parent.parent / "docs/formats/console.md").read_text()
    assert [which for which, number in numbers.items() if number not in page] == []
    assert numbers["owner"] != numbers["vm"]


# A02: who carries the frames


@pytest.mark.attack("A02")
def test_without_a_channel_whoever_carries_a_command_reads_and_changes_it() -> None:
    said = encode_console_message(Run(arguments=("echo", SECRET)))
    assert SECRET.encode() in said
    changed = said.replace(SECRET.encode(), SECRET.upper().encode())
    assert SECRET.upper().encode() in changed and len(changed) == len(said)


@pytest.mark.attack("A02")
def test_whoever_carries_the_frames_sees_nothing_of_the_command(machine: RunningMachine, relay: Relay) -> None:
    assert run_through(relay, machine, "echo", SECRET) == (0, f"{SECRET}\n".encode())
    assert all(SECRET.encode() not in frame for _side, frame in relay.seen)


def flipped(frame: bytes) -> list[bytes]:
    middle = len(frame) // 2
    return [frame[:middle] + bytes([frame[middle] ^ 1]) + frame[middle + 1 :]]


ALTERATIONS: dict[str, Callable[[bytes], list[bytes]]] = {
    "flipped": flipped,
    "cut short": lambda frame: [frame[:-1]],
    "repeated": lambda frame: [frame, frame],
    "made up": lambda frame: [os.urandom(len(frame)), frame],
}


@pytest.mark.attack("A02")
@pytest.mark.parametrize("how", ALTERATIONS)
@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("whose", ["owner", "sp"])
def test_an_altered_frame_ends_the_console_and_another_can_be_opened(
    machine: RunningMachine, relay: Relay, whose: Side, number: int, how: str
) -> None:
    """Whatever is done to a frame: what is heard is what was said, or an error."""
    relay.hook = lambda side, at, frame: ALTERATIONS[how](frame) if (side, at) == (whose, number) else [frame]
    done = machine.memory / "done"
    done.unlink(missing_ok=True)
    heard: list[bytes] = []
    results: list[int | SpvtpmError] = []

    def attempt() -> None:
        way = through_socket(relay.path)
        script = ("sh", "-c", f"touch done; echo {SECRET}")
        try:
            take = heard.append
            results.append(
                run_command(way, machine.key, machine.vm_id, script, lambda _stream, data: take(data), None, 5)
            )
        except SpvtpmError as error:
            results.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert results, "it hangs"
    assert b"".join(heard) in (b"", f"{SECRET}\n".encode())
    if results[0] == 0:
        assert b"".join(heard) == f"{SECRET}\n".encode()
    assert machine.run("true")[0] == 0


@pytest.mark.attack("A02")
@pytest.mark.attack("A11")
def test_the_frames_of_an_earlier_console_do_nothing_again(machine: RunningMachine, relay: Relay) -> None:
    machine.shell("rm -f count")
    run_through(relay, machine, "sh", "-c", "echo once >> count")
    with closing(OwnersEnd(machine)) as replayed:
        replayed.say_frames(*relay.frames("owner"))
        with pytest.raises(ConnectionError):
            while True:
                replayed.frame()
    assert machine.shell("cat count") == b"once\n"
