"""VMs that are made, ended, begun again and destroyed by their owners, over and over, whoever is killed meanwhile.

Each VM has a thread, which asks keyring and secure processor how the VM is, and picks a command that is allowed then. A
command that fails is said again, as an owner would; one that cannot be is left, and another picked. Everything goes through
the terminal's own functions, those that `spvtpm vm` calls.
"""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from spvtpm.files import read_file
from spvtpm.terminal.comeback import begin
from spvtpm.terminal.creation import create
from spvtpm.terminal.departure import end, recover
from spvtpm.terminal.destruction import destroy
from spvtpm.terminal.machines import Site, chip_where_it_lives, vtpm_of
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.whereabouts import Exporting, InFile
from spvtpm.wire.errors import NotFound, PolicyError, SpvtpmError
from spvtpm.wire.instance_file import MAX_FILE_BYTES, parse_instance_header
from spvtpm.wire.platform_errors import OperationUnderWay
from tests.owner import ANYTHING

_PATIENCE_S = 120.0
_PAUSES_S = (0.25, 0.5, 1.0, 2.0)


def new_vm(name: str) -> OwnedVm:
    """A VM that its owner wishes to have."""
    return OwnedVm(name=name, vm_id=uuid.uuid4(), vm_key=os.urandom(32), policy=ANYTHING)


def is_hibernated(path: Path) -> bool:
    """Whether an instance file is of a hibernated VM; by its header, which is the owner's own file here."""
    return parse_instance_header(read_file(path, MAX_FILE_BYTES, private=False)).hibernated


def state_of(site: Site, name: str) -> str:
    """How a VM is, as keyring and secure processor know: `none`, `unmade`, `home`, `asleep at home`, or as the latter says.

    Raises:
        SpvtpmError: the secure processor cannot be asked.
    """
    owned = site.keyring.vm(name)
    if owned is None:
        return "none"
    known = vtpm_of(site.keyring, owned.vm_id)
    if known is not None and isinstance(known.place, InFile):
        return "asleep at home" if is_hibernated(Path(known.place.path)) else "home"
    chip_id = chip_where_it_lives(known, owned)
    if known is None or chip_id is None:
        return "unmade"
    here = site.desk(chip_id).look(owned.vm_id)
    if here is not None:
        return here.state
    return "leaving" if isinstance(known.place, Exporting) else "arriving"


_Command = Callable[[], object]


def _commands(site: Site, name: str, state: str) -> dict[str, _Command]:
    """What an owner may say of a VM in this state; more often first."""
    away: dict[str, _Command] = {"destroy": partial(destroy, site, name)}
    start, resume = partial(begin, site, name, "start"), partial(begin, site, name, "resume")
    home: dict[str, _Command] = {"recover": partial(recover, site, name)}
    match state:
        case "none" | "unmade":
            return {"create": partial(create, site, new_vm(name))}
        case "home":
            return {"start": start, **away}
        case "asleep at home":
            return {"resume": resume, **away}
        case "stopped":
            return {"start": start, **home, **away}
        case "hibernated":
            return {"resume": resume, **home, **away}
        case "leaving":
            return home
        case "arriving":
            return {"start": start, "resume": resume}
        case _:
            return {
                "shutdown": partial(end, site, name, "shutdown"),
                "hibernate": partial(end, site, name, "hibernate"),
                "shutdown --stay": partial(end, site, name, "shutdown", stay=True),
                "hibernate --stay": partial(end, site, name, "hibernate", stay=True),
                **away,
            }


@dataclass
class Lives:
    """The VMs of some owners.

    Args:
        sites: of the owners.
        each: VMs of one owner.
        commands: how many are said in all.
        seed: for whatever is picked.

    Attributes:
        done: how often each command was done.
        failures: what was said when one was not, with its command.
    """

    sites: Sequence[Site]
    each: int
    commands: int
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)
    _begun: int = 0
    _is_over: bool = False
    _news: threading.Condition = field(default_factory=threading.Condition)

    @property
    def names(self) -> list[tuple[Site, str]]:
        """All VMs, with their owners."""
        return [(site, f"vm{number}-{other}") for number, site in enumerate(self.sites) for other in range(self.each)]

    def run(self, disturb: Callable[[random.Random], None]) -> None:
        """Lives all of them, and has somebody disturb meanwhile; then has every other one run.

        Args:
            disturb: called in a thread of its own; to end, with all running that shall run, once `wait` says that it is over.
        """
        names = self.names
        with ThreadPoolExecutor(len(names) + 1) as pool:
            disturbance = pool.submit(disturb, random.Random(self.seed))  # noqa: S311  # to be repeated
            lives = [pool.submit(self._live, *name, number) for number, name in enumerate(names)]
            try:
                for life in lives:
                    life.result()
            finally:
                with self._news:
                    self._is_over = True
                    self._news.notify_all()
            disturbance.result()
            settled = [pool.submit(self._settle, *name, number % 2 == 0) for number, name in enumerate(names)]
            for life in settled:
                life.result()

    def wait(self, begun: int, at_most_s: float | None = None) -> bool:
        """Waits until so many more commands were begun, or some time has passed; whether it is all over."""
        with self._news:
            until = self._begun + begun
            self._news.wait_for(lambda: self._is_over or self._begun >= until, at_most_s)
            return self._is_over

    def _live(self, site: Site, name: str, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)  # noqa: S311
        while self._begin():
            self._one(site, name, chance)

    def _begin(self) -> bool:
        with self._news:
            if self._begun >= self.commands:
                return False
            self._begun += 1
            self._news.notify_all()
            return True

    def _one(self, site: Site, name: str, chance: random.Random) -> None:
        ends = time.monotonic() + _PATIENCE_S
        while True:
            try:
                commands = _commands(site, name, state_of(site, name))
                break
            except SpvtpmError as error:
                self._failed("look", error, ends)
        words = list(commands)
        self._say(chance.choices(words, range(2 * len(words), len(words), -1))[0], commands, ends)

    def _say(self, word: str, commands: dict[str, _Command], ends: float) -> bool:
        for pause_s in (*_PAUSES_S, 0.0):
            try:
                commands[word]()
            except SpvtpmError as error:
                self._failed(word, error, ends, pause_s)
                if isinstance(error, (PolicyError, NotFound)) and not isinstance(error, OperationUnderWay):
                    return False
            else:
                self.done[word] += 1
                return True
        return False

    def _failed(self, word: str, error: SpvtpmError, ends: float, pause_s: float = 0.5) -> None:
        assert str(error), f"{word} failed, and does not say why: {error!r}"
        self.failures.append((word, f"[{error.code}] {error}"))
        assert time.monotonic() < ends, f"{word} does not end: {error}"
        time.sleep(pause_s)  # an owner who says it again

    def _settle(self, site: Site, name: str, runs: bool) -> None:
        """With nobody disturbing any more, every VM comes to a state that lasts."""
        lasting = ("running",) if runs else ("none", "home", "asleep at home", "stopped", "hibernated", "running")
        ends = time.monotonic() + _PATIENCE_S
        while True:
            try:
                state = state_of(site, name)
                if state in lasting:
                    return
                commands = _commands(site, name, state)
            except SpvtpmError as error:
                self._failed("look", error, ends)
                continue
            for word in commands if state in ("arriving", "failed") else list(commands)[:1]:
                self._say(word, commands, ends)
