"""`python -m models`: checks the model of the handoff, property by property; `--write` writes its rules anew."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from models.check import LIVENESS, SAFETY, WORLDS, Checker
from models.rules_as_promela import WRITTEN, rules_as_promela


def main() -> int:
    """The exit code: 1 if a property does not hold."""
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write handoff_rules.pml from the tables, and check nothing"
    )
    if parser.parse_args().write:
        WRITTEN.write_text(rules_as_promela())
        return 0
    is_right = True
    for world in WORLDS:
        print(f"{world}:")
        with tempfile.TemporaryDirectory(prefix="spvtpm-model-") as directory:
            checker = Checker(Path(directory), world)
            for name in SAFETY + LIVENESS:
                finding = checker.check(name)
                is_right &= finding.holds
                verdict = "holds" if finding.holds else "is violated"
                print(f"  {name:36} {verdict:11} {finding.states:>9,} states {finding.seconds:5.1f} s", flush=True)
                if finding.trace:
                    print(finding.trace)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
