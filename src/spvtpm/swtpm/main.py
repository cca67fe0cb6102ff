"""The command `spvtpm-swtpm`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path

from spvtpm.swtpm.options import Options, parse_options, wants_capabilities
from spvtpm.swtpm.process import serve
from spvtpm.wire.errors import SpvtpmError, StorageError

_CAPABILITIES = ("tpm-2.0", "flags-opt-startup", "cmdarg-seccomp", "nvram-backend-dir", "rsa-keysize-2048")
"""By swtpm's names. Source: swtpm(8), "--print-capabilities"."""


def main() -> None:
    """Runs the command line; ends the process with 0, or with 1 and a sentence on stderr, as swtpm does."""
    words = sys.argv[1:]
    if wants_capabilities(words):
        print(json.dumps({"type": "swtpm", "features": _CAPABILITIES, "version": version("spvtpm")}))
        return
    try:
        options = parse_options(words, os.environ)
        _open_log(options)
        ready = _into_background() if options.daemon else None
        _run(options, ready)
    except SpvtpmError as error:
        print(f"spvtpm-swtpm: {error}", file=sys.stderr)
        sys.exit(1)


def _open_log(options: Options) -> None:
    stream = sys.stderr
    try:
        if isinstance(options.log, int):
            stream = os.fdopen(options.log, "w")
        elif options.log is not None:
            stream = options.log.open("w" if options.truncates else "a")
    except OSError as error:
        raise StorageError(f"the log cannot be written: {error.strerror}") from None
    logging.basicConfig(stream=stream, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


def _into_background() -> int:
    """Goes on as another process, without a terminal; this one ends when that one is ready, or with it.

    Returns:
        A descriptor; a byte written there says that it is ready.
    """
    ended, ready = os.pipe()
    if os.fork():
        os.close(ready)
        is_ready = bool(os.read(ended, 1))
        os._exit(0 if is_ready else 1)
    os.close(ended)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    os.close(null)
    return ready


def _run(options: Options, ready: int | None) -> None:
    def tell() -> None:
        _write_pid(options.pid)
        if ready is not None:
            os.write(ready, b"\0")
            os.close(ready)
            os.dup2(0, 2)

    try:
        asyncio.run(serve(options, tell))
    finally:
        if isinstance(options.pid, Path):
            options.pid.unlink(missing_ok=True)


def _write_pid(where: Path | int | None) -> None:
    line = f"{os.getpid()}\n"
    try:
        if isinstance(where, int):
            os.write(where, line.encode())
        elif where is not None:
            where.write_text(line)
    except OSError as error:
        raise StorageError(f"the process id cannot be written: {error.strerror}") from None
