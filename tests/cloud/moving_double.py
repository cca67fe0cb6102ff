"""What an agent double and its secure processor do for a VM that moves: tokens that prove something, and a link that can break.

The order of things is that of docs/formats/migration.md; how tokens are made is not: here the source shows their hashes first.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from spvtpm.wire.agent_api import HandoffReport
from spvtpm.wire.errors import SpvtpmError, WrongState

PATIENCE_S = 20.0
FRAME = 1 << 16

Stage = Literal["linked", "copied", "stopped", "ready", "gone"]
"""Of a departure: its link is there; memory was copied; the VM is halted; the destination has all; it was given up."""


def shown(token: str) -> str:
    """What is shown of a token before it is given."""
    return hashlib.sha256(bytes.fromhex(token)).hexdigest()


@dataclass
class Departure:
    """A handoff at its source. `lock` is the double's."""

    lock: threading.RLock
    sequence: int
    keep: Callable[[], None]
    halt: Callable[[], None]
    handoff: str = field(default_factory=lambda: secrets.token_hex(16))
    commit: str = field(default_factory=lambda: secrets.token_hex(32))
    abort: str = field(default_factory=lambda: secrets.token_hex(32))
    outcome: Literal["open", "kept", "gone"] = "open"
    failure: str = ""
    copied: int = 0
    is_linked: bool = False
    receipt: str = ""  # what was shown of it

    def take_back(self, failure: str = "") -> None:
        """The VM stays, if it was not given up."""
        with self.lock:
            if self.outcome == "gone":
                raise WrongState("the VM was given up")
            if self.outcome == "open":
                self.outcome, self.failure = "kept", failure
                self.keep()

    def serve(self, link: ServerConnection, frames: int, at: Callable[[Stage], None]) -> None:
        """Moves the VM through its link."""
        self.is_linked = True
        failure = "the link was lost"
        try:
            self._move(link, frames, at)
        except SpvtpmError as error:
            failure = str(error)
        except (ConnectionClosed, TimeoutError):
            pass
        finally:
            self.is_linked = False
            with suppress(WrongState):
                self.take_back(failure)

    def _move(self, link: ServerConnection, frames: int, at: Callable[[Stage], None]) -> None:
        link.send((shown(self.commit) + shown(self.abort)).encode())
        at("linked")
        self.receipt = bytes(link.recv(PATIENCE_S)).decode()  # type: ignore[arg-type]
        for _ in range(frames):
            link.send(bytes(FRAME))
            self.copied += FRAME
        at("copied")
        with self.lock:
            if self.outcome != "open":
                return
            self.halt()
        at("stopped")
        link.send(b"state")
        assert link.recv(PATIENCE_S) == b"have it"
        at("ready")
        with self.lock:
            if self.outcome != "open":
                return
            self.outcome = "gone"
        at("gone")
        link.send(b"the end")

    def report(self) -> HandoffReport:
        """What the source says."""
        token = {"open": None, "kept": self.abort, "gone": self.commit}[self.outcome]
        return HandoffReport(
            handoff=self.handoff,
            outcome=self.outcome,
            is_linked=self.is_linked,
            copied_bytes=self.copied,
            token=token,
            failure=self.failure,
        )


@dataclass
class Arrival:
    """A handoff at its destination."""

    handoff: str
    shown: str = ""  # of the commit token, then of the abort token
    copied: int = 0
    has_state: bool = False
    is_whole: bool = False
    is_linked: bool = False
    has_come: bool = False
    receipt: str = field(default_factory=lambda: secrets.token_hex(32))

    def serve(self, link: ServerConnection) -> None:
        """Takes a VM from its link."""
        self.is_linked = True
        try:
            self.shown = bytes(link.recv(PATIENCE_S)).decode()  # type: ignore[arg-type]
            link.send(shown(self.receipt).encode())
            for frame in link:
                assert isinstance(frame, bytes)
                if frame == b"state":
                    self.has_state = True
                    link.send(b"have it")
                elif frame == b"the end":
                    self.is_whole = True
                else:
                    self.copied += len(frame)
        except (ConnectionClosed, TimeoutError):
            pass
        finally:
            self.is_linked = False

    def verify_commit(self, token: str | None) -> None:
        """Whether the VM may go on here."""
        if token is None or shown(token) != self.shown[:64] or not self.has_state:
            raise WrongState("no commit token of this handoff")

    def verify_abort(self, token: str | None) -> None:
        """Whether the VM may be forgotten here."""
        if self.has_come or token is None or self.shown[64:] not in {"", shown(token)}:
            raise WrongState("no abort token of this handoff")

    def report(self) -> HandoffReport:
        """What the destination says."""
        return HandoffReport(
            handoff=self.handoff,
            outcome="come" if self.has_come else "open",
            is_linked=self.is_linked,
            copied_bytes=self.copied,
            token=self.receipt if self.has_come else None,
        )
