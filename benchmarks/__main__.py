"""`python -m benchmarks`: everything in one run, a table, and JSON for machines. Needs root for other processes' memory."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from tests.harness import RunningSp

from benchmarks.cloud_load import measure_cloud
from benchmarks.density import measure_density
from benchmarks.instances import measure_instances
from benchmarks.lifecycle import measure_lifecycle
from benchmarks.migration import measure_migration
from benchmarks.report import Section, as_json, machine, print_section
from benchmarks.roundtrip import measure_round_trips
from benchmarks.swtpm import find_swtpm, swtpm_version
from spvtpm.wire import messages

_CONFIG = "park_after_s = 86400.0\n"
"""Nothing is parked but by command; all else is the default."""


def _counts(text: str) -> list[int]:
    counts = sorted({int(part) for part in text.split(",")})
    if counts[0] < 1:
        raise ValueError(text)
    return counts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="spvtpm and the system's swtpm, side by side. Needs root, to weigh other users' processes.",
        epilog="Exit codes: 0 all targets reached; 1 one was not; 2 cannot measure here. Example: make bench ARGS=--quick",
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples: about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--vtpms", type=_counts, metavar="N,N,…", help="default 1,10,100,1000; quick: 1,10,100")
    parser.add_argument("--cloud-vms", type=int, metavar="N", help="VMs of the cloud; 0: none. Default 200; quick: 16")
    arguments = parser.parse_args()
    if arguments.cloud_vms is None:
        arguments.cloud_vms = 16 if arguments.quick else 200
    if arguments.vtpms is None:
        arguments.vtpms = [1, 10, 100] if arguments.quick else [1, 10, 100, 1000]
    return arguments


def _file_system(path: Path) -> str:
    return subprocess.run(
        ["df", "--output=fstype", str(path)], capture_output=True, text=True, check=True
    ).stdout.split()[-1]


def main() -> int:
    """Measures and prints; the exit code says whether every target was reached."""
    arguments = _arguments()
    console, progress_console = Console(), Console(stderr=True)
    try:
        swtpm_path = find_swtpm()
    except FileNotFoundError as error:
        progress_console.print(f"benchmarks: {error}")
        return 2
    if os.geteuid() != 0:
        progress_console.print("benchmarks: the memory of workers, who are other users, can be weighed by root alone")
        return 2
    begin = time.monotonic()
    sections: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="spvtpm-bench-") as directory, progress_console.status("…") as status:
        scratch = Path(directory)
        where: dict[str, object] = {
            **machine(),
            "swtpm": swtpm_version(swtpm_path),
            "file system": _file_system(scratch),
        }

        def progress(step: str) -> None:
            status.update(f"[{time.monotonic() - begin:3.0f} s] {step}")
            if not progress_console.is_terminal:
                progress_console.print(f"[{time.monotonic() - begin:3.0f} s] {step}", highlight=False, markup=False)

        with RunningSp(scratch / "sp", _CONFIG) as sp:
            reply = sp.call(messages.GetStatus())
            assert isinstance(reply, messages.Status)
            where |= {"spvtpm": reply.software, "missing protection": reply.missing_protection}
            sections.append(measure_round_trips(sp, swtpm_path, scratch, quick=arguments.quick, progress=progress))
            sections.append(measure_lifecycle(sp, swtpm_path, scratch, quick=arguments.quick, progress=progress))
            sections.append(measure_instances(sp, quick=arguments.quick, progress=progress))
        with RunningSp(scratch / "many", _CONFIG) as sp:
            sections.append(measure_density(sp, swtpm_path, scratch, counts=arguments.vtpms, progress=progress))
        sections.append(measure_migration(swtpm_path, scratch, _CONFIG, quick=arguments.quick, progress=progress))
        if arguments.cloud_vms > 0:
            sections.append(measure_cloud(scratch, vms=arguments.cloud_vms, progress=progress))
    gc.collect()
    _print(console, where, sections)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": where, "sections": as_json(sections)}, indent=2) + "\n")
    return 0 if all(row.reached is not False for section in sections for row in section.rows) else 1


def _print(console: Console, where: dict[str, object], sections: list[Section]) -> None:
    console.print("\nspvtpm and swtpm, side by side", style="bold")
    console.print(
        "p50: median, p95: 95th percentile. Ratio: p50 of ours / p50 of swtpm's; "
        "[green]at most 1.00 is our promise[/], [red]red is not reached[/].",
    )
    console.print(
        "  ".join(f"{name}: {value or 'none'}" for name, value in where.items()), style="dim", highlight=False
    )
    console.print()
    for section in sections:
        print_section(console, section)


if __name__ == "__main__":
    sys.exit(main())
