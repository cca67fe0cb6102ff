"""How the demo speaks: chapters, commands, checks, and at its end the table of claims. Knows nothing of TPMs."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_MAX_WIDTH = 100
_TABLE_WIDTH = 116
_UUID = re.compile(r"([0-9a-f]{8})-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the closing table.

    Attributes:
        name: its id in the list of claims.
        sentence: what is claimed.
        shown_by: what the demo does to show it.
    """

    name: str
    sentence: str
    shown_by: str


class Story:
    """Prints, and keeps account of what was checked.

    Args:
        terminal: None for standard output.
    """

    def __init__(self, terminal: Console | None = None) -> None:
        terminal = terminal or Console()
        self._terminal_width = terminal.width if terminal.is_terminal else _TABLE_WIDTH
        terminal.width = min(self._terminal_width, _MAX_WIDTH)
        self._console = terminal
        self._muted = False
        self._chapters = 0
        self._begun_s = time.monotonic()
        self._now_showing: Claim | None = None
        self._checks: dict[Claim, int] = {}
        self._failures: dict[Claim, str] = {}

    # Speaking

    def title(self, title: str, what: str) -> None:
        """The first lines."""
        self._console.print(Text(f"\n{title}", style="bold"))
        self._console.print(Text(what))

    def chapter(self, title: str, why: str) -> None:
        """Begins a chapter: what it shows, and why that matters."""
        self._chapters += 1
        self._console.print()
        self._console.rule(Text(f"{self._chapters}. {title}", style="bold cyan"), align="left", style="cyan")
        self._console.print(Text(f"{why}\n", style="italic"))

    def say(self, text: str) -> None:
        """A remark between commands."""
        if not self._muted:
            self._console.print(Text(text))

    def command(self, prompt: str, words: Sequence[str]) -> None:
        """A command line, abbreviated and cut to one line."""
        if not self._muted:
            line = Text.assemble((prompt, "bold magenta"), " ", (_abbreviate(shlex.join(words)), "bold"))
            self._console.print(line, no_wrap=True, overflow="ellipsis", crop=True)

    def output(self, lines: Iterable[str], style: str = "dim") -> None:
        """What a command printed, or what was found."""
        if not self._muted:
            for line in lines:
                self._console.print(Padding(Text(_abbreviate(line), style=style), (0, 0, 0, 4), expand=False))

    @contextmanager
    def only_checks(self) -> Iterator[None]:
        """Within this, remarks and commands are left out."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    # Keeping account

    @contextmanager
    def showing(self, claim: Claim) -> Iterator[None]:
        """Within this, every check belongs to the claim; an error fails it and goes on."""
        self._now_showing = claim
        try:
            yield
        except Exception as error:
            self._failures.setdefault(claim, str(error) or type(error).__name__)
            raise
        finally:
            self._now_showing = None

    def check(self, sentence: str, ok: bool) -> None:
        """States whether something holds. What does not hold fails the claim shown now; the story goes on."""
        mark = ("  ✓ ", "bold green") if ok else ("  ✗ ", "bold red")
        self._console.print(Text.assemble(mark, (sentence, "green" if ok else "red")))
        if self._now_showing is None:
            raise RuntimeError("a check outside of any claim")
        self._checks[self._now_showing] = self._checks.get(self._now_showing, 0) + 1
        if not ok:
            self._failures.setdefault(self._now_showing, f"not so: {sentence}")

    def error(self, text: str) -> None:
        """What broke the story off."""
        self._console.print(Text(f"\n✗ {text}", style="bold red"))

    def close(self, claims: Sequence[Claim]) -> bool:
        """Prints the table; returns whether all of it was shown."""
        self._console.width = min(self._terminal_width, _TABLE_WIDTH)
        table = Table("claim", "what must be true", "shown by", "result", box=box.SIMPLE_HEAD, pad_edge=False)
        table.columns[0].no_wrap = table.columns[3].no_wrap = True
        shown = 0
        for claim in claims:
            failure = self._failures.get(claim)
            if failure is None and claim in self._checks:
                shown += 1
                result = Text("ok", style="bold green")
            else:
                result = Text("FAILED", style="bold red")
            by = Text(claim.shown_by)
            if failure is not None:
                by.append(f"\n{failure}", style="red")
            elif claim not in self._checks:
                by.append("\nthe story broke off before this was shown", style="red")
            table.add_row(claim.name, claim.sentence, by, result)
        self._console.print()
        self._console.rule(Text("What was shown", style="bold cyan"), align="left", style="cyan")
        self._console.print(table)
        checks = sum(self._checks.values())
        seconds = time.monotonic() - self._begun_s
        style = "bold green" if shown == len(claims) else "bold red"
        self._console.print(
            Text(f"{shown} of {len(claims)} claims shown by {checks} checks in {seconds:.1f} s.", style=style)
        )
        return shown == len(claims)


def _abbreviate(text: str) -> str:
    return _UUID.sub(r"\1…", text)
