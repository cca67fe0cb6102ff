"""The compiled harnesses of fuzz/native: libFuzzer with AddressSanitizer and UndefinedBehaviorSanitizer, built by clang."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fuzz.target import CORPUS

ROOT = Path(__file__).parent.parent
_NATIVE = ROOT / "fuzz" / "native"
_PACKAGE = ROOT / "src" / "spvtpm"
_FLAGS = (
    *("-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"),
    *("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"),
)
_SMALLEST = "#include <stdint.h>\nint LLVMFuzzerTestOneInput(const uint8_t *d, unsigned long n) { return (int)(d[0] & n & 0); }\n"


@dataclass(frozen=True, slots=True)
class NativeTarget:
    """One harness.

    Attributes:
        name: of the target.
        about: one line for `--list`.
        source: its file in fuzz/native.
        scribble: whether a second thread writes the memory meanwhile.
        longest: bytes of the longest input worth trying.
    """

    name: str
    about: str
    source: str
    scribble: bool = False
    longest: int = 512

    @property
    def corpus(self) -> list[str]:
        """The folder of its saved inputs, if it has one."""
        folder = CORPUS / self.name
        return [str(folder)] if folder.is_dir() else []

    def command(self, harness: Path) -> list[str]:
        """How to call it; more of libFuzzer's flags, or an input, follow."""
        scribble = ["--scribble"] if self.scribble else []
        return [str(harness), *scribble, f"-max_len={self.longest}"]


NATIVE_TARGETS: dict[str, NativeTarget] = {
    target.name: target
    for target in (
        NativeTarget("native-direct", "direct.h, mailbox.h, crb_device.h under sanitizers", "direct_fuzz.c"),
        NativeTarget("native-direct-race", "the same, with the memory changing meanwhile", "direct_fuzz.c", True, 128),
        NativeTarget("native-driver", "driver.h under sanitizers", "driver_fuzz.c"),
        NativeTarget("native-driver-race", "the same, with the memory changing meanwhile", "driver_fuzz.c", True, 64),
    )
}


class CannotCompile(Exception):
    """The text is what clang says."""


def _compile(arguments: list[str], source: str | None = None) -> None:
    done = subprocess.run(["clang", *arguments], input=source, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotCompile(done.stderr.strip())


@cache
def why_not() -> str | None:
    """Why harnesses cannot be compiled here; None if they can."""
    if shutil.which("clang") is None:
        return "clang is not installed (scripts/setup.sh fuzz)"
    try:
        _compile(["-x", "c", "-fsanitize=fuzzer,address,undefined", "-", "-o", "/dev/null"], _SMALLEST)
    except CannotCompile as error:
        return f"clang has no sanitizer runtime (scripts/setup.sh fuzz): {error}"
    return None


def build(target: NativeTarget, folder: Path) -> Path:
    """Compiles a harness into the folder.

    Raises:
        CannotCompile: clang's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    definitions = folder / "crb_definitions.h"
    definitions.write_text(runpy.run_path(str(_PACKAGE / "wire" / "crb_header.py"))["c_definitions"]())
    harness = folder / Path(target.source).stem
    places = [_PACKAGE / "wire", _PACKAGE / "processor" / "interfaces", _PACKAGE / "guest"]
    includes = ["-include", str(definitions), *(f"-I{place}" for place in places)]
    _compile([*_FLAGS, *includes, str(_NATIVE / target.source), "-o", str(harness), "-lcrypto", "-pthread"])
    return harness
