"""The worker's end of the socket pair to the SP: blocking, one thread, messages in order."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from spvtpm.processor.worker import messages
from spvtpm.processor.worker.messages import Commit, Committed, Endorse, Endorsed, FromWorker, ToWorker
from spvtpm.wire.errors import FrameError, MessageError, StorageError
from spvtpm.wire.framing import MAX_FRAME_BYTES, FrameDecoder, encode_frame

MAX_DESCRIPTORS = 3
_LENGTH_BYTES = 4


class SecureProcessorGoneError(Exception):
    """The SP closed the connection: this worker has nobody to work for."""


class Control:
    """What a worker can ask of the SP: above all, to make an NV change durable.

    Args:
        connection: connected stream socket; nobody else reads it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._decoder = FrameDecoder()
        self._waiting: deque[ToWorker] = deque()

    def fileno(self) -> int:
        """For polling."""
        return self._socket.fileno()

    def receive_descriptors(self) -> list[int]:
        """The descriptors that come ahead of the first message."""
        data, descriptors, _flags, _address = socket.recv_fds(self._socket, 1, MAX_DESCRIPTORS)
        if not data:
            raise SecureProcessorGoneError
        return descriptors

    def send(self, message: FromWorker) -> None:
        """Sends one message whole."""
        try:
            self._socket.sendall(encode_frame(messages.encode(message)))
        except OSError:
            raise SecureProcessorGoneError from None

    def receive(self) -> ToWorker:
        """The next message; waits for it.

        Raises:
            SecureProcessorGoneError: the connection ended.
        """
        while not self._waiting:
            self._waiting.extend(self._read())
        return self._waiting.popleft()

    def commit(self, permanent: bytes, meanwhile: Callable[[], None]) -> None:
        """Returns once the permanent state is durable.

        Args:
            permanent: the state.
            meanwhile: done while the disk works.

        Raises:
            StorageError: it is not; the SP's sentence why.
        """
        self.send(Commit(permanent))
        meanwhile()
        later: list[ToWorker] = []
        while not isinstance(answer := self.receive(), Committed):
            later.append(answer)
        self._waiting.extendleft(reversed(later))
        if answer.failure is not None:
            raise StorageError(answer.failure)

    def endorse(self, request: Endorse) -> Endorsed:
        """The certificates of a new TPM's EKs; to be asked for before `receive_descriptors`.

        Raises:
            MessageError: the SP says something else.
        """
        self.send(request)
        answer = messages.parse_to_worker(self._exactly(int.from_bytes(self._exactly(_LENGTH_BYTES), "big")))
        if not isinstance(answer, Endorsed):
            raise MessageError(f"{type(answer).__name__} is no answer to Endorse")
        return answer

    def _exactly(self, size: int) -> bytes:
        """So many bytes and not one more: descriptors may come with the next."""
        try:
            data = self._socket.recv(min(size, MAX_FRAME_BYTES), socket.MSG_WAITALL)
        except OSError:
            data = b""
        if len(data) < size:
            raise SecureProcessorGoneError
        return data

    def pending(self) -> bool:
        """Whether messages wait that were read while waiting for something else."""
        return bool(self._waiting)

    def _read(self) -> list[ToWorker]:
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            raise SecureProcessorGoneError
        try:
            return [messages.parse_to_worker(frame) for frame in self._decoder.feed(data)]
        except (FrameError, MessageError):
            raise SecureProcessorGoneError from None
