"""QEMU's monitor, when who listens there is not QEMU, or a QEMU that its guest has taken over."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from spvtpm.hypervisor.qemu_memory import load_memory, save_memory
from spvtpm.hypervisor.qemu_monitor import Empty, QemuMonitor, RunStatus
from spvtpm.wire.errors import StorageError
from spvtpm.wire.platform_errors import MachineFailed

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}, "package": ""}, "capabilities": []}}


class Impostor:
    """Listens as QEMU does, negotiates, and answers everything else with the same line."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "qmp.sock"
        self.answer: bytes | None = b""  # None: hangs up
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            with connection, suppress(OSError):
                self._speak(connection)

    def _speak(self, connection: socket.socket) -> None:
        connection.sendall(json.dumps(GREETING).encode() + b"\r\n")
        while asked := connection.recv(4096):  # one command at a time, without the end of a line
            if not asked.strip():  # it came with a descriptor
                continue
            number = json.dumps(json.loads(asked).get("id")).encode()
            if b"qmp_capabilities" in asked:
                connection.sendall(b'{"return": {}}\r\n')
            elif self.answer is None:
                return
            else:
                connection.sendall(self.answer.replace(b"ID", number) + b"\r\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Impostor]:
    listening = Impostor(tmp_path)
    yield listening
    listening.close()


def ask(impostor: Impostor, pid: int | None = None) -> RunStatus:
    async def run() -> RunStatus:
        monitor = QemuMonitor(impostor.path, pid or os.getpid())
        try:
            return await monitor.execute("query-status", RunStatus)
        finally:
            await monitor.close()

    return asyncio.run(run())


def test_an_answer_is_read(impostor: Impostor) -> None:
    impostor.answer = b'{"return": {"status": "running", "running": true}, "id": ID}'
    assert ask(impostor).status == "running"


@pytest.mark.attack("A25")
@pytest.mark.parametrize(
    "answer",
    [
        b'{"return": {"status": 7}, "id": ID}',
        b'{"return": [], "id": ID}',
        b'{"return": {}, "id": ID}',
        b'{"error": {"class": "GenericError", "desc": "no\\u001b[2J"}, "id": ID}',
        b'{"error": "no", "id": ID}',
        b"[]",
        b"nonsense",
        None,
    ],
)
def test_another_answer_is_a_typed_error(impostor: Impostor, answer: bytes | None) -> None:
    impostor.answer = answer
    with pytest.raises(MachineFailed) as refused:
        ask(impostor)
    assert str(refused.value).isprintable()


@pytest.mark.attack("A27")
def test_another_process_is_not_spoken_to(impostor: Impostor) -> None:
    with pytest.raises(MachineFailed, match="another process than QEMU"):
        ask(impostor, os.getppid())


def test_who_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    async def run() -> None:
        await QemuMonitor(tmp_path / "qmp.sock", os.getpid()).execute("stop", Empty)

    with pytest.raises(MachineFailed, match="cannot be had"):
        asyncio.run(run())


def test_a_memory_that_cannot_be_written_leaves_the_older_image(impostor: Impostor, tmp_path: Path) -> None:
    impostor.answer = b'{"return": {"status": "failed", "error-desc": "no room"}, "id": ID}'
    image = tmp_path / "image"
    image.write_bytes(b"older")

    async def run() -> None:
        monitor = QemuMonitor(impostor.path, os.getpid())
        try:
            await save_memory(monitor, image)
        finally:
            await monitor.close()

    with pytest.raises(MachineFailed, match="no room"):
        asyncio.run(run())
    assert image.read_bytes() == b"older"


@pytest.mark.attack("A25")
def test_what_a_machine_puts_in_the_place_of_its_image_is_not_read(impostor: Impostor, tmp_path: Path) -> None:
    image = tmp_path / "image"
    os.mkfifo(image)

    async def run() -> None:
        monitor = QemuMonitor(impostor.path, os.getpid())
        await load_memory(monitor, image)

    with pytest.raises(StorageError, match="no regular file"):
        asyncio.run(run())
