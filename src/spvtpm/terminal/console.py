"""The owner's end of a VM's console: one command in the VM, its input, its output, its exit code.

Whoever shows the VM's end of the console's key has the VM key: the VM itself, or its secure processor. What carries the frames
has not.
"""

from __future__ import annotations

import itertools
import os
import queue
import select
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.terminal.conversation import Conversation, hear_clear
from spvtpm.terminal.relay import OpenRelay, Relay
from spvtpm.terminal.session import TIMEOUT_S
from spvtpm.wire.certificates import MALFORMED
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.console import (
    MAX_CONSOLE_MESSAGE_BYTES,
    PIECE_BYTES,
    ConsoleRequest,
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
from spvtpm.wire.console_window import Intake, Room
from spvtpm.wire.decoding import printable
from spvtpm.wire.errors import CertificateError, SpvtpmError, UntrustedIssuer, UsageError, error_from_code
from spvtpm.wire.introductions import Introduce, encode_clear
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.owner_certificates import build_owner_certificate

_FOREVER_S: Final = 30.0 * 24 * 3600
"""A command may be silent; that the platform is still there, the WebSocket's pings tell."""

_LOOK_S: Final = 0.5

Write = Callable[[Literal["stdout", "stderr"], bytes], None]
"""Takes what the command writes."""


class Reading:
    """What a command reads. As long as nobody knows that the command has begun, it is kept for the next attempt. Thread-safe.

    Args:
        read_from: a descriptor; None: there is nothing to read.
    """

    def __init__(self, read_from: int | None) -> None:
        self._read_from = read_from
        self._kept: list[bytes] = []  # a window at most, and the end of input
        self._keeps = True
        self._turn = threading.Lock()

    def piece(self, index: int, is_wanted: Callable[[], bool]) -> bytes | None:
        """The piece of this number, from 0; empty: the end of input; None: it is not wanted any more.

        Raises:
            OSError: it cannot be read.
        """
        with self._turn:
            if index < len(self._kept):
                return self._kept[index]
            if self._read_from is None:
                return b""
            if not self._await_input(self._read_from, is_wanted):
                return None
            data = os.read(self._read_from, PIECE_BYTES)
            if self._keeps:
                self._kept.append(data)
            else:
                self._kept.clear()
            return data

    def has_begun(self) -> None:
        """The command that reads it has begun: there will be no other attempt."""
        self._keeps = False

    @staticmethod
    def _await_input(descriptor: int, is_wanted: Callable[[], bool]) -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while is_wanted():
            if poll.poll(_LOOK_S * 1000) and is_wanted():
                return True
        return False


def parse_words(arguments: Sequence[str]) -> Run:
    """A command, from the program and what it is told.

    Raises:
        UsageError: the words are none that a command can be told.
    """
    try:
        return msgspec.convert({"type": "Run", "arguments": arguments}, Run)
    except msgspec.ValidationError:
        raise UsageError("a command has 1 to 256 words of at most 4,096 characters") from None


def run_command(
    way: OpenRelay,
    vm_key: bytes,
    vm_id: uuid.UUID,
    arguments: Sequence[str],
    write: Write,
    read_from: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> int:
    """Runs a command in a VM; its exit code. Whoever leaves this early, by an exception, ends the command.

    Args:
        way: to the VM's console.
        vm_key: 32 bytes.
        vm_id: the VM.
        arguments: the program and what it is told.
        write: takes what it writes.
        read_from: descriptor of what it reads; None: nothing.
        timeout_s: how long each message may take that is not a command's own.

    Raises:
        UsageError: the words are none that a command can be told.
        UntrustedIssuer: who answers does not have the VM's key.
        SpvtpmError: the VM's refusal; or the channel broke: nobody knows what became of the command then.
    """
    command = parse_words(arguments)
    return carry_out(open_console(way(timeout_s), vm_key, vm_id), command, write, Reading(read_from))


def carry_out(conversation: Conversation, command: Run, write: Write, reading: Reading) -> int:
    """Runs a command over an open console, which ends with this; the rest as `run_command`.

    Raises:
        CommandNotBegun: the VM itself says so; what was read for it is kept in `reading`.
        SpvtpmError: as of `run_command`.
    """
    under_way = _UnderWay(conversation, reading)
    try:
        under_way.begin(command)
        return under_way.watch(write)
    finally:
        under_way.close()


def open_console(relay: Relay, vm_key: bytes, vm_id: uuid.UUID) -> Conversation:
    """Opens a VM's console. Nothing has begun then.

    Raises:
        As `run_command`.
    """
    try:
        key = console_key(vm_key, vm_id, "owner")
        certificate = build_owner_certificate(key)
        relay.send([encode_clear(Introduce(certificate.public_bytes(Encoding.DER)))])
        peer = hear_clear(relay, Introduce).certificate
        _check_peer(peer, console_key(vm_key, vm_id, "vm"))
        channel = SecureChannel(key, certificate, peer, is_server=False, max_message_bytes=MAX_CONSOLE_MESSAGE_BYTES)
        conversation = Conversation(relay, channel)
        conversation.shake_hands()
    except BaseException:
        relay.close()
        raise
    return conversation


def _check_peer(der: bytes, key: EllipticCurvePrivateKey) -> None:
    """Whether a certificate is of this key; TLS shows then that the other side has it."""
    try:
        shown = x509.load_der_x509_certificate(der).public_key()
    except MALFORMED:
        raise CertificateError("what answers as the VM's console shows no certificate") from None
    if shown != key.public_key():
        raise UntrustedIssuer("what answers as the VM's console does not have the VM's key")


class _UnderWay:
    """A command that runs: one thread hears what the VM says, and waits for nothing else; one reads for the command; one writes.

    Args:
        conversation: open; ends with this.
        reading: what the command reads.
    """

    def __init__(self, conversation: Conversation, reading: Reading) -> None:
        self._conversation = conversation
        self._reading = reading
        self._is_over = False
        self._room = Room()
        self._intake = Intake()
        self._heard: queue.SimpleQueue[Output | Ended | ErrorReply | Exception] = (
            queue.SimpleQueue()
        )  # a window at most
        self._listener = threading.Thread(target=self._listen, name="console-output", daemon=True)

    def begin(self, command: Run) -> None:
        self._listener.start()
        self._say(command)
        threading.Thread(target=self._feed, name="console-input", daemon=True).start()

    def watch(self, write: Write) -> int:
        while True:
            try:
                heard = self._heard.get(timeout=_LOOK_S)
            except queue.Empty:  # a Ctrl-C that came just before is noticed now
                continue
            if isinstance(heard, Exception):
                raise heard
            if isinstance(heard, ErrorReply):
                raise error_from_code(heard.code, printable(heard.message))
            if isinstance(heard, Ended):
                return heard.code
            write(heard.stream, heard.data)
            if told := self._intake.taken():
                self._say(Taken(pieces=told))

    def close(self) -> None:
        self._is_over = True
        self._room.close()
        self._conversation.close()
        self._listener.join()

    def _listen(self) -> None:
        try:
            while True:
                reply = parse_console_reply(self._conversation.receive(time.monotonic() + _FOREVER_S))
                if not isinstance(reply, ErrorReply):
                    self._reading.has_begun()
                if isinstance(reply, Taken):
                    self._room.give_back(reply.pieces)
                    continue
                if isinstance(reply, Output):
                    self._intake.come()
                self._heard.put(reply)
                if not isinstance(reply, Output):
                    return
        except Exception as error:  # whatever it is: somebody waits
            self._heard.put(error)
        finally:
            self._room.close()

    def _feed(self) -> None:
        """Sends what there is to read; ends with the input, the command, or the process."""
        with suppress(OSError):
            for index in itertools.count():
                data = self._reading.piece(index, lambda: not self._is_over)
                if not data:
                    break
                if not self._room.await_piece():
                    return
                self._say(Input(data=data))
            if data is not None:
                self._say(EndOfInput())

    def _say(self, request: ConsoleRequest) -> None:
        try:
            self._conversation.send(encode_console_message(request))
        except SpvtpmError as error:
            self._heard.put(error)  # behind what was heard before: that counts
