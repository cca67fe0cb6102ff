"""What the commands that speak with a cloud platform have in common: the way to it, progress, words. Their modules come in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spvtpm.cli.terminal_parts import Own, tell_verified, tell_verified_as_json
from spvtpm.wire.errors import UsageError
from spvtpm.wire.platform_errors import NotLoggedIn

if TYPE_CHECKING:
    from spvtpm.terminal.attestation import Verified
    from spvtpm.terminal.machines import Site
    from spvtpm.wire.platform_api import Operation

_EXTRA = ("httpx", "websockets")


@contextmanager
def extra_needed() -> Iterator[None]:
    """Around imports of what only the extra `platform` brings.

    Raises:
        UsageError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        raise UsageError("this needs what a base installation leaves out: pip install 'spvtpm[platform]'") from None


@contextmanager
def at_platform(own: Own, json: bool) -> Iterator[Site]:
    """The owner at the platform of the keyring. Tells on stderr which chips were verified, and how far things are.

    Raises:
        NotLoggedIn: the keyring knows none.
    """
    with extra_needed():
        from spvtpm.terminal.machines import Site
        from spvtpm.terminal.platform import Platform

    keyring = own.open()
    account = keyring.content.account
    if account is None:
        raise NotLoggedIn("the keyring knows no platform")
    told: set[bytes] = set()

    def tell(verified: Verified) -> None:
        if verified.chip_id not in told:
            told.add(verified.chip_id)
            (tell_verified_as_json if json else tell_verified)(verified)

    with Platform(account) as platform, _Bars() as bars:
        yield Site(keyring, platform, tell, bars.operation, bars.transfer)


class _Bars:
    """Two bars on stderr, if a person is there to see them: the operation's steps, and the transfer's bytes."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

        console, is_seen = Console(stderr=True), sys.stderr.isatty()
        words = TextColumn("{task.description}", markup=False)
        self._steps = Progress(words, BarColumn(), MofNCompleteColumn(), console=console, transient=True)
        self._bytes = Progress(words, BarColumn(), DownloadColumn(), console=console, transient=True)
        self._shown: Progress | None = None
        self._is_seen = is_seen
        self._has_begun = False

    def operation(self, operation: Operation) -> None:
        """Shows how far an operation is."""
        from spvtpm.wire.decoding import printable

        self._has_begun = True
        words = f"{operation.kind} {operation.vm_name}: {printable(operation.step)}"
        self._show(self._steps, words, operation.steps_done, operation.steps)
        if operation.state in ("done", "failed"):
            self._hide()

    def transfer(self, done: int, total: int) -> None:
        """Shows how far a transfer is."""
        self._show(self._bytes, "transfer", done, total)
        if done >= total:
            self._hide()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_ended: object) -> None:
        self._hide()
        if kind is KeyboardInterrupt and self._has_begun:
            print("interrupted; the same command again does what is left to do", file=sys.stderr)

    def _show(self, bar: object, words: str, done: int, total: int) -> None:
        from rich.progress import Progress

        assert isinstance(bar, Progress)  # noqa: S101
        if not self._is_seen:
            return
        if self._shown is not bar:
            self._hide()
            bar.start()
            self._shown = bar
        for task in bar.task_ids:
            bar.update(task, description=words, completed=done, total=total)
        if not bar.task_ids:
            bar.add_task(words, completed=done, total=total)

    def _hide(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            for task in list(self._shown.task_ids):
                self._shown.remove_task(task)
            self._shown = None
