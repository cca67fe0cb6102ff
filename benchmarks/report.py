"""What was measured, as figures, as a table for people, as JSON for machines."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

Unit = Literal["µs", "ms", "KiB", "VMs/s", "MiB/s", "×"]
_NS_PER: dict[Unit, float] = {"µs": 1e3, "ms": 1e6}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity.

    Attributes:
        p50: median, or the only value.
        p95: 95th percentile, if there were samples.
        samples: how many.
    """

    p50: float
    p95: float | None = None
    samples: int = 1

    @classmethod
    def of_times(cls, times_ns: Sequence[int], unit: Unit) -> Figure:
        """Median and 95th percentile of durations in nanoseconds."""
        scaled = sorted(time_ns / _NS_PER[unit] for time_ns in times_ns)
        return cls(statistics.median(scaled), scaled[min(len(scaled) - 1, len(scaled) * 95 // 100)], len(scaled))


@dataclass(frozen=True, slots=True)
class Row:
    """One line: ours against theirs.

    Attributes:
        name: what was measured.
        unit: of the figures.
        ours: spvtpm's.
        theirs: swtpm's; None where it has no such thing, or was not asked.
        target: what ours, or the ratio if there is one, should not exceed.
        note: what a reader must know to read it right.
    """

    name: str
    unit: Unit
    ours: Figure
    theirs: Figure | None = None
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Median of ours / median of theirs; below 1 ours is better."""
        return None if self.theirs is None or not self.theirs.p50 else self.ours.p50 / self.theirs.p50

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None if there is none."""
        if self.target is None:
            return None
        measured = self.ours.p50 if self.ratio is None else self.ratio
        return round(measured, 3 if self.target < 1 else 2) <= self.target  # as it is printed


@dataclass(slots=True)
class Section:
    """Rows that belong together.

    Attributes:
        title: heading.
        rows: in order.
        notes: sentences below the table.
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _figure(figure: Figure | None, unit: str) -> tuple[str, str]:
    if figure is None:
        return "–", ""
    return f"{_number(figure.p50)} {unit}", "" if figure.p95 is None else _number(figure.p95)


def _verdict(row: Row) -> str:
    text = "" if row.target is None else f"target ≤ {_number(row.target)}"
    if row.ratio is not None:
        text = f"{row.ratio:.3f}" if row.ratio < 0.1 else f"{row.ratio:.2f}"
    if row.reached is None:
        return text
    return f"[bold {'green' if row.reached else 'red'}]{text}[/]"


def print_section(console: Console, section: Section) -> None:
    """One table."""
    table = Table(title=section.title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    table.add_column("measured")
    for heading in ("spvtpm p50", "p95", "swtpm p50", "p95", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    footnotes = list(dict.fromkeys(row.note for row in section.rows if row.note))
    for row in section.rows:
        ours, theirs = _figure(row.ours, row.unit), _figure(row.theirs, row.unit)
        mark = f" [dim]({footnotes.index(row.note) + 1})[/]" if row.note else ""
        table.add_row(f"{row.name}{mark}", *ours, *theirs, _verdict(row))
    console.print(table)
    for text in [f"({number}) {note}" for number, note in enumerate(footnotes, 1)] + section.notes:
        console.print(Padding(text, (0, 2)), style="dim", highlight=False)
    console.print()


def machine() -> dict[str, str | int]:
    """Where this was measured."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def as_json(sections: Sequence[Section]) -> list[dict[str, object]]:
    """The sections as plain values, with ratios."""
    return [
        {
            "title": section.title,
            "notes": section.notes,
            "rows": [{**asdict(row), "ratio": row.ratio, "reached": row.reached} for row in section.rows],
        }
        for section in sections
    ]
