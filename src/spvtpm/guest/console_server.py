"""The VM's end of its console: whoever has the VM key may have a command run (`wire/console.py`). One command a connection."""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import threading
import time
import uuid
from contextlib import suppress
from typing import IO, Final, Literal

from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.guest.command_pipes import pieces, write_pieces
from spvtpm.guest.commands import NOT_EXECUTABLE, NOT_FOUND, Commands
from spvtpm.guest.frame_stream import FrameStream
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.console import (
    MAX_CONSOLE_MESSAGE_BYTES,
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
from spvtpm.wire.console_window import Intake, Room
from spvtpm.wire.errors import CertificateRefused, ChannelError, MessageError, SpvtpmError
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES, Introduce, encode_clear, parse_clear
from spvtpm.wire.messages import error_reply
from spvtpm.wire.owner_certificates import parse_owner_certificate

log = logging.getLogger(__name__)

_INTRODUCTION_S: Final = 20.0
_LAST_WORDS_S: Final = 5.0
_UNHEARD_BYTES: Final = 1 << 16

_Stream = Literal["stdout", "stderr"]


class Console:
    """Serves console connections.

    Args:
        vm_key: 32 bytes.
        vm_id: of the VM.
        commands: that run.
    """

    def __init__(self, vm_key: bytes, vm_id: uuid.UUID, commands: Commands) -> None:
        self._key = console_key(vm_key, vm_id, "vm")
        self._owner = console_key(vm_key, vm_id, "owner").public_key()
        self._certificate = build_console_certificate(self._key)
        self._commands = commands

    def serve(self, connection: socket.socket) -> None:
        """One connection, to its end; its errors are its own."""
        stream = FrameStream(connection, MAX_CHANNEL_FRAME_BYTES)
        try:
            channel, said = self._open(stream)
            _Conversation(stream, channel, said).serve(self._commands)
        except SpvtpmError as error:
            log.info("a console ended: %s", error)
        finally:
            _see_off(connection)

    def _open(self, stream: FrameStream) -> tuple[SecureChannel, list[bytes]]:
        """The open channel, and what was said in it already: whoever is between may join frames."""
        try:
            self._commands.await_entry(stream.has_gone)
            deadline = time.monotonic() + _INTRODUCTION_S
            channel = self._introduce(stream, deadline)
        except SpvtpmError as error:
            stream.send(encode_clear(error_reply(error)))
            raise
        said: list[bytes] = []
        while not channel.is_open:
            said += channel.receive(_next(stream, deadline))
            stream.send(*channel.frames())
        return channel, said

    def _introduce(self, stream: FrameStream, deadline: float) -> SecureChannel:
        said = parse_clear(_next(stream, deadline))
        if not isinstance(said, Introduce):
            raise MessageError(f"{type(said).__name__} where Introduce was expected")
        peer = parse_owner_certificate(said.certificate)
        if peer.public_key() != self._owner:
            raise CertificateRefused("whoever comes to this console does not have the VM's key")
        stream.send(encode_clear(Introduce(self._certificate.public_bytes(Encoding.DER))))
        return SecureChannel(
            self._key,
            self._certificate,
            peer.public_bytes(Encoding.DER),
            is_server=True,
            max_message_bytes=MAX_CONSOLE_MESSAGE_BYTES,
        )


def _see_off(connection: socket.socket) -> None:
    """Waits for the other side to hear all and close. Words of its own that cross ours would be refused by a socket that is
    closed, and whoever carries them then drops what he has not read yet: the command's output, and its exit code.
    """
    deadline = time.monotonic() + _LAST_WORDS_S
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while (left_s := deadline - time.monotonic()) > 0:
            connection.settimeout(left_s)
            if not connection.recv(_UNHEARD_BYTES):
                return


def _next(stream: FrameStream, deadline: float) -> bytes:
    frame = stream.receive(deadline)
    if frame is None:
        raise ChannelError("the introductions took too long")
    return frame


class _Conversation:
    """One command over an open channel: this thread reads what the owner sends, and waits for nothing else; others send."""

    def __init__(self, stream: FrameStream, channel: SecureChannel, said: list[bytes]) -> None:
        self._stream = stream
        self._channel = channel
        self._turn = threading.Lock()  # held for one use of the channel
        self._sending = threading.Lock()  # held until all frames of a message are gone; meanwhile the owner is heard
        self._requests = said
        self._room = Room()  # for output of both streams: the owner takes it in the order in which it comes
        self._intake = Intake()
        self._quiet = os.eventfd(0, os.EFD_CLOEXEC)  # nothing more is awaited of the command
        self._over = os.eventfd(0, os.EFD_CLOEXEC)  # all that it has written is sent

    def serve(self, commands: Commands) -> None:
        try:
            run = self._hear(time.monotonic() + _INTRODUCTION_S)
            if not isinstance(run, Run):
                raise MessageError("a console begins with Run")
            self._say(Ended(code=self._run(run, commands)), is_last=True)
        except ChannelError:
            raise
        except SpvtpmError as error:
            self._say(error_reply(error), is_last=True)
            raise
        finally:
            for descriptor in (self._quiet, self._over):
                os.close(descriptor)
            with suppress(SpvtpmError):
                self._say(is_last=True)

    def _run(self, run: Run, commands: Commands) -> int:
        """The exit code, once all that was written is sent."""
        try:
            command = commands.start(run.arguments, self._stream.has_gone)
        except OSError as error:
            self._pass_on(f"{run.arguments[0]}: {error.strerror}\n".encode(), "stderr")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        waiter = threading.Thread(target=self._see_out, args=(command, commands), daemon=True, name="command")
        waiter.start()
        try:
            self._feed(command)
        finally:
            self._room.close()
            commands.bury(command)
            waiter.join()
        return command.returncode if command.returncode >= 0 else 128 - command.returncode

    def _see_out(self, command: subprocess.Popen[bytes], commands: Commands) -> None:
        """Passes on what the command writes; returns when it is over."""
        assert command.stdout is not None and command.stderr is not None  # noqa: S101  # pipes
        readers = [
            threading.Thread(target=self._read_out, args=(pipe, stream), daemon=True, name="output")
            for pipe, stream in ((command.stdout, "stdout"), (command.stderr, "stderr"))
        ]
        for reader in readers:
            reader.start()
        commands.await_end(command)
        deadline = time.monotonic() + _LAST_WORDS_S
        for reader in readers:  # what it has started may write still
            reader.join(max(0.0, deadline - time.monotonic()))
        commands.bury(command)
        os.eventfd_write(self._quiet, 1)  # what has left its process group may hold the pipe open as long as it likes
        for reader in readers:  # the owner may look at a page of output meanwhile
            reader.join()
        os.eventfd_write(self._over, 1)

    def _read_out(self, pipe: IO[bytes], stream: _Stream) -> None:
        with pipe, suppress(SpvtpmError):  # nobody hears; `_feed` sees that, too
            for data in pieces(pipe, self._quiet):
                if not self._pass_on(data, stream):
                    return

    def _pass_on(self, data: bytes, stream: _Stream) -> bool:
        """Sends a piece once there is room; False: the owner has gone."""
        may_go = self._room.await_piece()
        if may_go:
            self._say(Output(stream=stream, data=data))
        return may_go

    def _feed(self, command: subprocess.Popen[bytes]) -> None:
        """Passes on what the command reads, until it is over."""
        assert command.stdin is not None  # noqa: S101  # a pipe
        waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # a window at most
        arguments = (command.stdin, waiting, self._tell_taken)
        threading.Thread(target=write_pieces, args=arguments, daemon=True, name="input").start()
        may_say = True
        try:
            while (request := self._hear(None, self._over)) is not None:
                if isinstance(request, Taken):
                    self._room.give_back(request.pieces)
                    continue
                if isinstance(request, Run) or not may_say:
                    raise MessageError(f"{type(request).__name__} where it means nothing")
                if isinstance(request, Input):
                    self._intake.come()
                    waiting.put(request.data)
                else:
                    waiting.put(b"")
                    may_say = False
        finally:
            waiting.put(b"")

    def _tell_taken(self) -> None:
        if told := self._intake.taken():
            with suppress(SpvtpmError):  # nobody hears; `_feed` sees that, too
                self._say(Taken(pieces=told))

    def _hear(self, deadline: float | None, or_readable: int | None = None) -> ConsoleRequest | None:
        while not self._requests:
            frame = self._stream.receive(deadline, or_readable)
            if frame is None:
                return None
            with self._turn:
                self._requests += self._channel.receive(frame)
        return parse_console_request(self._requests.pop(0))

    def _say(self, *replies: ConsoleReply, is_last: bool = False) -> None:
        """Sends; behind what is last, nothing more can be said."""
        with self._sending:
            with self._turn:
                for reply in replies:
                    self._channel.send(encode_console_message(reply))
                if is_last:
                    self._channel.close()
                frames = self._channel.frames()
            self._stream.send(*frames)
