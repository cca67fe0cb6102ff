"""Parts of a stack are started in order, started again when they die, given up when that does not help, ended in order."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spvtpm.processor.daemon import initialise
from spvtpm.stack import supervisor as supervising
from spvtpm.stack.process import Part, in_words
from spvtpm.stack.supervisor import Supervisor
from spvtpm.wire.platform_errors import PartFailed
from tests.papers import put_chip_file


class Heard:
    """What a person would have read; a test can wait for a sentence."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self._awaited: list[tuple[str, asyncio.Event]] = []

    def tell(self, sentence: str) -> None:
        self.sentences.append(sentence)
        for words, event in self._awaited:
            if words in sentence:
                event.set()

    async def hears(self, words: str) -> None:
        event = asyncio.Event()
        self._awaited.append((words, event))
        async with asyncio.timeout(60):
            await event.wait()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as directory:
        yield Path(directory)


@pytest.fixture
def lock(place: Path) -> Iterator[int]:
    """What every part holds open."""
    descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    yield descriptor
    os.close(descriptor)


def secure_processor(place: Path, name: str, lock: int) -> Part:
    """A part that works: a new secure processor."""
    put_chip_file(place / f"{name}.chip")
    initialise(place / name, place / f"{name}.chip")
    return Part(name, ("sp", "run", str(place / name)), place / f"{name}.log", lock)


def end() -> None:
    """Somebody says that it is enough."""
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_part_that_was_killed_runs_again_and_the_person_is_told(place: Path, lock: int) -> None:
    async def scene() -> list[str]:
        heard = Heard()
        supervisor = Supervisor(heard)
        part = secure_processor(place, "sp-1", lock)
        await supervisor.start(part)
        assert part.address == str(place / "sp-1" / "run" / "sp.sock")
        watch = asyncio.create_task(supervisor.watch())
        first = part.pid
        assert first is not None
        back = asyncio.create_task(heard.hears("runs again"))
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        await back
        assert part.pid != first
        end()
        await watch
        await supervisor.stop()
        return heard.sentences

    told = asyncio.run(scene())
    assert told == ["sp-1 has ended (killed by SIGKILL); it is started again in 0.25 s", "sp-1 runs again"]
    assert (place / "sp-1.log").read_text().count("stopping: ") == 1  # the second one ended in order


def test_a_part_that_dies_again_and_again_is_given_up_and_its_log_is_named(
    place: Path, lock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "FIRST_PAUSE_S", 0.01)

    async def scene() -> None:
        supervisor = Supervisor(Heard())
        part, other = (secure_processor(place, name, lock) for name in ("sp-1", "sp-2"))
        await supervisor.start(part, other)
        (place / "sp-1" / "sp.toml").write_text("nonsense = 1\n")
        assert part.pid is not None
        os.kill(part.pid, signal.SIGKILL)
        try:
            await supervisor.watch()
        finally:
            await supervisor.stop()

    with pytest.raises(PartFailed, match=f"sp-1 ends again and again .*{place}/sp-1.log"):
        asyncio.run(scene())
    assert "nonsense" in (place / "sp-1.log").read_text()
    assert "stopping: " in (place / "sp-2.log").read_text()


def test_a_part_that_does_not_start_is_not_tried_again(place: Path, lock: int) -> None:
    async def scene() -> None:
        supervisor = Supervisor(Heard())
        await supervisor.start(Part("sp-1", ("sp", "run", str(place / "nothing")), place / "sp-1.log", lock))

    with pytest.raises(PartFailed, match="ended while it started, exit code 3"):
        asyncio.run(scene())
    assert (place / "sp-1.log").read_text().count("[no-sp]") == 1


def test_whoever_is_told_to_end_while_parts_start_ends_them(place: Path, lock: int) -> None:
    async def scene() -> int | None:
        supervisor = Supervisor(Heard())
        part = secure_processor(place, "sp-1", lock)
        asyncio.get_running_loop().call_soon(end)
        await supervisor.start(part)
        await supervisor.watch()
        await supervisor.stop()
        assert supervisor.is_ending
        return part.pid

    pid = asyncio.run(scene())
    assert pid is None or not Path(f"/proc/{pid}").exists()


def test_levels_end_in_the_opposite_order(place: Path, lock: int) -> None:
    async def scene() -> None:
        supervisor = Supervisor(Heard())
        lower, upper = (secure_processor(place, name, lock) for name in ("sp-1", "sp-2"))
        await supervisor.start(lower)
        await supervisor.start(upper)
        assert lower.pid is not None and upper.pid is not None
        ends: list[str] = []

        async def note(part: Part) -> None:
            await part.ended()
            ends.append(part.name)

        notes = [asyncio.create_task(note(part)) for part in (lower, upper)]
        await supervisor.stop()
        await asyncio.gather(*notes)
        assert ends == ["sp-2", "sp-1"]

    asyncio.run(scene())


def test_ends_are_told_in_words() -> None:
    assert in_words(4) == "exit code 4"
    assert in_words(-9) == "killed by SIGKILL"
    assert in_words(-99) == "killed by signal 99"
