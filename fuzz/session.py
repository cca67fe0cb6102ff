"""One target in Python, fuzzed in this process for a while, or run on one saved input: `python -m fuzz.session`.

With atheris, where it is installed, inputs are led by coverage; otherwise Hypothesis makes them. A finding's input is saved,
its traceback goes to stderr, and the exit code is not 0. This is what `python -m fuzz` starts for each target.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz.target import Target

_BATCH = 500
_TIMEOUT_S = 180
_MEMORY_MB = 4096
_EXECUTED = "executed"


def has_atheris() -> bool:
    """Whether inputs can be led by coverage."""
    return importlib.util.find_spec("atheris") is not None


def _target(name: str, atheris: Any) -> Target:
    """The target, with the modules that it tests instrumented."""
    if atheris is None:
        module = importlib.import_module("fuzz.targets")
    else:
        with atheris.instrument_imports(include=["spvtpm"]):
            module = importlib.import_module("fuzz.targets")
    target: Target = module.TARGETS[name]
    return target


def _dictionary(words: Sequence[bytes], path: Path) -> Path:
    """The words in the format of libFuzzer's -dict."""
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in words)
    path.write_text("".join(f'"{word}"\n' for word in escaped))
    return path


def _with_atheris(atheris: Any, target: Target, arguments: argparse.Namespace) -> int:
    corpus: Path = arguments.corpus
    for seed in target.seeds():
        (corpus / f"seed-{hashlib.sha256(seed).hexdigest()[:16]}").write_bytes(seed)
    flags = [
        f"-max_total_time={arguments.seconds}",
        f"-seed={arguments.seed}",
        f"-artifact_prefix={arguments.findings}/",
        f"-max_len={target.longest}",
        f"-timeout={_TIMEOUT_S}",
        f"-rss_limit_mb={_MEMORY_MB}",
        "-print_final_stats=1",
    ]
    if target.words:
        flags.append(f"-dict={_dictionary(target.words, corpus.with_suffix('.dict'))}")
    saved = target.saved()
    folders = [str(corpus), *([str(saved[0].parent)] if saved else [])]
    atheris.Setup([sys.argv[0], *flags, *folders], target.run, enable_python_coverage=True)
    atheris.Fuzz()  # ends the process
    return 0


def _with_hypothesis(target: Target, arguments: argparse.Namespace) -> int:
    generate = importlib.import_module("fuzz.generate")
    end = time.monotonic() + arguments.seconds
    number = arguments.seed
    while time.monotonic() < end:
        finding = generate.explore(target, examples=_BATCH, seed_number=number)
        if finding is not None:
            path = arguments.findings / f"crash-{hashlib.sha256(finding.data).hexdigest()[:16]}"
            path.write_bytes(finding.data)
            traceback.print_exception(finding.error)
            return 1
        number += 1
    print(f"{_EXECUTED}: {(number - arguments.seed) * _BATCH}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.session", description="fuzz one Python target in this process"
    )
    parser.add_argument("target", metavar="TARGET", help="a name of `python -m fuzz --list`")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the target on this input, once")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz/corpus"))
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz/findings"))
    return parser.parse_args()


def main() -> int:
    """Fuzzes or replays."""
    arguments = _arguments()
    if arguments.replay is not None:
        _target(arguments.target, None).run(arguments.replay.read_bytes())
        return 0
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    arguments.findings.mkdir(parents=True, exist_ok=True)
    atheris = importlib.import_module("atheris") if has_atheris() else None
    target = _target(arguments.target, atheris)
    if atheris is not None:
        return _with_atheris(atheris, target, arguments)
    return _with_hypothesis(target, arguments)


if __name__ == "__main__":
    sys.exit(main())
