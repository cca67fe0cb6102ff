"""A command in a VM at a platform, also while the VM moves to another host: that is a pause then, and no error.

A command that has certainly not begun is asked for again, for a while: no console could be opened before it was said, or the VM
itself has answered that it has not begun. Once it was said and nothing was answered, nobody knows; it is never said twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from spvtpm.terminal.console import Reading, Write, carry_out, open_console, parse_words
from spvtpm.terminal.following import migration_under_way
from spvtpm.terminal.machines import Site
from spvtpm.terminal.owned import OwnedVm
from spvtpm.terminal.platform_relay import to_console
from spvtpm.wire.console import Run
from spvtpm.wire.errors import ChannelError, NotRunning, SpvtpmError, WrongState
from spvtpm.wire.platform_errors import CommandNotBegun, Unavailable

PATIENCE_S: Final = 60.0
"""How long a VM may be on its way."""

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 0.5
_MAY_PASS: Final = (ChannelError, Unavailable, NotRunning, WrongState, CommandNotBegun)
"""What may be so because a VM moves just now. Who answers without the VM's key is none of it."""


def run_in_vm(
    site: Site,
    owned: OwnedVm,
    arguments: Sequence[str],
    write: Write,
    read_from: int | None = None,
    *,
    tell_waiting: Callable[[], None] = lambda: None,
    patience_s: float = PATIENCE_S,
) -> int:
    """Runs a command in a VM; its exit code. Whoever leaves this early, by an exception, ends the command.

    Args:
        site: of the owner.
        owned: the VM.
        arguments: the program and what it is told.
        write: takes what it writes.
        read_from: descriptor of what it reads; None: nothing. Of that, nothing is lost by another attempt.
        tell_waiting: is told, once, that the VM is on its way and is waited for.
        patience_s: how long it may be on its way.

    Raises:
        UsageError: the words are none that a command can be told.
        UntrustedIssuer: who answers does not have the VM's key.
        SpvtpmError: it has not begun; or the channel broke: nobody knows what became of the command then.
    """
    command, reading = parse_words(arguments), Reading(read_from)
    pauses = _Pauses(site, owned, tell_waiting, patience_s)
    while True:
        try:
            return _attempt(site, owned, command, write, reading)
        except _NotBegun as failure:
            pauses.take(failure.why)


class _NotBegun(Exception):
    """The command has certainly not begun."""

    def __init__(self, why: SpvtpmError) -> None:
        super().__init__(str(why))
        self.why = why


def _attempt(site: Site, owned: OwnedVm, command: Run, write: Write, reading: Reading) -> int:
    try:
        conversation = open_console(to_console(site.platform, owned.vm_id)(site.timeout_s), owned.vm_key, owned.vm_id)
    except _MAY_PASS as error:
        raise _NotBegun(error) from None
    try:
        return carry_out(conversation, command, write, reading)
    except CommandNotBegun as error:
        raise _NotBegun(error) from None


class _Pauses:
    """Between attempts, as long as the VM moves; behind that, there is one more."""

    def __init__(self, site: Site, owned: OwnedVm, tell_waiting: Callable[[], None], patience_s: float) -> None:
        self._site = site
        self._owned = owned
        self._tell_waiting = tell_waiting
        self._patience_s = patience_s
        self._ends: float | None = None
        self._delay_s = _FIRST_DELAY_S
        self._has_settled = False
        self._has_told = False

    def take(self, why: SpvtpmError) -> None:
        """Waits for a moment before the next attempt.

        Raises:
            SpvtpmError: there will be none, for this reason.
        """
        try:
            vm = self._site.platform.vm(self._owned.vm_id)
            moves = migration_under_way(self._site, vm) is not None
        except SpvtpmError:
            raise why from None
        if not moves and (self._has_settled or vm.state != "running" or vm.operation is not None):
            raise why
        self._has_settled = not moves
        if moves and not self._has_told:
            self._has_told = True
            self._tell_waiting()
        now = time.monotonic()
        self._ends = now + self._patience_s if self._ends is None else self._ends
        if now > self._ends:
            raise why
        time.sleep(self._delay_s if moves else 0)
        self._delay_s = min(2 * self._delay_s, _LONGEST_DELAY_S)
