"""`python -m fuzz`: every target for its share of the time; a finding is explained, saved, and makes the exit code 1."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from fuzz import native
from fuzz.native import NATIVE_TARGETS
from fuzz.session import has_atheris
from fuzz.targets import TARGETS

_ROOT = Path(__file__).parent.parent
_BUILD = Path("build/fuzz")
_GRACE_S = 240
"""A target that is still not back so long after its time hangs; libFuzzer itself gives an input 180 s."""

_TAIL_LINES = 60
_EXAMPLES = """\
examples:
  python -m fuzz --minutes 10                        all targets, ten minutes together
  python -m fuzz --minutes 60 --target direct --target native-direct
  python -m fuzz --target counter --replay build/fuzz/findings/counter/crash-…

Exit codes: 0 nothing found; 1 a finding, saved; 2 wrong usage."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz",
        description="Hostile bytes for every parser. What was learnt is kept, and used the next time.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = (*TARGETS, *NATIVE_TARGETS)
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N", help="time for all targets together; default 10"
    )
    parser.add_argument(
        "--target", action="append", choices=names, metavar="NAME", help="this one only; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="name the targets, and stop")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="of the random choices; default: the time")
    parser.add_argument(
        "--corpus", type=Path, default=_BUILD / "corpus", metavar="DIR", help="interesting inputs are kept here"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the one target named on this saved input")
    arguments = parser.parse_args()
    if arguments.replay is not None and len(arguments.target or ()) != 1:
        parser.error("--replay needs one --target")
    if arguments.minutes <= 0:
        parser.error("--minutes must be more than 0")
    if arguments.seed is None:
        arguments.seed = int(time.time()) % (1 << 31)
    return arguments


def _list() -> None:
    lines = [(target.name, target.about) for target in TARGETS.values()]
    lines += [(target.name, target.about) for target in NATIVE_TARGETS.values()]
    width = max(len(name) for name, _about in lines)
    for name, about in lines:
        print(f"{name:{width}}  {about}")


def _replay_command(name: str, path: Path) -> list[str]:
    if name in TARGETS:
        return [sys.executable, "-m", "fuzz.session", name, "--replay", str(path)]
    target = NATIVE_TARGETS[name]
    return [*target.command(native.build(target, _BUILD / "native")), str(path)]


def _fuzz_command(name: str, seconds: int, seed: int, corpus: Path, findings: Path) -> list[str]:
    if name in TARGETS:
        command = [sys.executable, "-m", "fuzz.session", name, f"--seconds={seconds}", f"--seed={seed}"]
        return [*command, f"--corpus={corpus}", f"--findings={findings}"]
    target = NATIVE_TARGETS[name]
    flags = [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={findings}/", "-print_final_stats=1"]
    return [
        *target.command(native.build(target, _BUILD / "native")),
        *flags,
        "-timeout=60",
        str(corpus),
        *target.corpus,
    ]


def _executed(log: str) -> int | None:
    found = re.findall(r"(?:executed|stat::number_of_executed_units): *(\d+)", log)
    return int(found[-1]) if found else None


def _tail(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-_TAIL_LINES:])


def _explain(name: str, saved: list[Path], log: str) -> None:
    """What was found, as a run of the saved input tells it, and how to see it again."""
    print(f"\nFINDING in target {name}")
    for path in saved:
        again = subprocess.run(
            _replay_command(name, path), check=False, capture_output=True, text=True, errors="replace"
        )
        print(f"  input:      {path} ({path.stat().st_size} bytes)")
        print(f"  reproduce:  {sys.executable} -m fuzz --target {name} --replay {path}")
        if again.returncode != 0:
            print(_tail(again.stderr))
        else:
            print("  It does not happen every time. What was said when it did:")
            print(_tail(log))
    if not saved:
        print("  No input was saved. What it said:")
        print(_tail(log))
    print(flush=True)


def _fuzz(name: str, seconds: int, arguments: argparse.Namespace) -> bool:
    """One target; whether something was found."""
    corpus, findings = arguments.corpus / name, _BUILD / "findings" / name
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    begin = time.monotonic()
    try:
        command = _fuzz_command(name, seconds, arguments.seed, corpus, findings)
        done = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds + _GRACE_S,
        )
    except subprocess.TimeoutExpired:
        _explain(name, [], f"it did not come back within {seconds + _GRACE_S} s")
        return True
    took = time.monotonic() - begin
    executed = _executed(done.stdout)
    rate = f"{executed} inputs, {executed / took:.0f} a second" if executed is not None else "ended early"
    print(f"{rate}, in {took:.0f} s", flush=True)
    saved = sorted(set(findings.iterdir()) - before)
    if done.returncode != 0 or saved:
        _explain(name, saved, done.stdout)
        return True
    return False


def _chosen(arguments: argparse.Namespace) -> list[str]:
    names = list(dict.fromkeys(arguments.target or (*TARGETS, *NATIVE_TARGETS)))
    reason = native.why_not() if any(name in NATIVE_TARGETS for name in names) else None
    if reason is not None:
        print(f"fuzz: the native targets are left out: {reason}", file=sys.stderr)
        names = [name for name in names if name in TARGETS]
    if not has_atheris():
        print("fuzz: atheris is not installed (scripts/setup.sh fuzz): inputs are not led by coverage", file=sys.stderr)
    return names


def main() -> int:
    """Fuzzes, lists or replays."""
    arguments = _arguments()
    if arguments.list:
        _list()
        return 0
    if arguments.replay is not None:
        path = arguments.replay.resolve()
        os.chdir(_ROOT)
        return 1 if subprocess.run(_replay_command(arguments.target[0], path), check=False).returncode else 0
    arguments.corpus = arguments.corpus if arguments.corpus == _BUILD / "corpus" else arguments.corpus.resolve()
    os.chdir(_ROOT)
    names = _chosen(arguments)
    if not names:
        return 2
    seconds = max(1, round(arguments.minutes * 60 / len(names)))
    print(f"{len(names)} targets, {seconds} s each, seed {arguments.seed}", flush=True)
    found = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}: ", end="", flush=True)
        if _fuzz(name, seconds, arguments):
            found.append(name)
    print(f"findings in: {', '.join(found)}" if found else "nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
