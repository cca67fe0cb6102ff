"""Runs the demo.

Exit codes: 0 everything was shown; 1 something was not; 2 it takes no arguments; 4 a program or library is missing;
130 interrupted.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from spvtpm.demo.cast import Cast
from spvtpm.demo.chapters import CHAPTERS, CLAIMS
from spvtpm.demo.cloud_vm import CloudVm
from spvtpm.demo.owner import OwnerTerminal
from spvtpm.demo.platform import CloudPlatform
from spvtpm.demo.stage import ActFailed, ChipVendor, SecureProcessorHost
from spvtpm.demo.story import Story
from spvtpm.wire.errors import SpvtpmError

_PROGRAMS = {"tpm2_pcrread": "tpm2-tools", "openssl": "openssl"}
_LIBRARIES = {
    "libtss2-tcti-swtpm.so.0": "libtss2-tcti-swtpm0",
    "libtss2-tcti-cmd.so.0": "libtss2-tcti-cmd0",
    "libtpms.so.0": "libtpms0",
}
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LONGEST_TEMPORARY = 40
"""Unix socket paths have at most 107 bytes; the demo needs about 60 below its own directory."""


def missing_packages() -> list[str]:
    """The Debian packages whose programs and libraries are not there."""
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    for library, package in _LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            missing.append(package)
    return missing


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    parent = tempfile.gettempdir()
    if len(parent) > _LONGEST_TEMPORARY:
        parent = "/tmp"  # noqa: S108  # the directory made in it is private
    with tempfile.TemporaryDirectory(prefix="spvtpm-demo-", dir=parent, ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def tell(story: Story) -> bool:
    """Plays all chapters with real processes; returns whether every claim was shown. Leaves nothing behind."""
    story.title(
        "spvtpm: virtual TPMs inside a secure processor",
        "A cloud with two users, whose VMs each have a TPM that the cloud can neither read nor forge. All of this happens now, "
        "between real processes. Commands behind vm-a$ and vm-b$ run inside the VMs, those behind cloud# and host-1# are the "
        "cloud's, those behind alice$ and bob$ are typed far away. Blue lines are what the platform saw of it. A line with ✓ "
        "was checked; the table at the end says what is shown by it.",
    )
    with ExitStack() as cleanup:
        directory = cleanup.enter_context(_temporary_directory())
        with story.only_checks():
            vendor, forger = (ChipVendor(name, directory, story) for name in ("vendor", "forger"))
            cloud = CloudPlatform(directory, story)
            cleanup.callback(cloud.stop)
            alice, bob = (OwnerTerminal(name, directory, cloud, story) for name in ("alice", "bob"))
        host, next_host, impostor = (
            SecureProcessorHost(name, directory, story) for name in ("host-1", "host-2", "host-x")
        )
        outdated = SecureProcessorHost("host-3", directory, story, firmware=0)
        hosts = host, next_host, impostor, outdated
        for host in hosts:
            cleanup.callback(host.stop)
        vms = CloudVm("vm-a", alice, story), CloudVm("vm-b", bob, story)
        cast = Cast(story, directory, vendor, forger, cloud, *hosts, alice, bob, vms)
        cleanup.callback(cast.close)
        cleanup.callback(_ignore_signals)  # called first: nothing interrupts the rest
        try:
            for chapter in CHAPTERS:
                chapter(cast)
        except (ActFailed, SpvtpmError, OSError) as error:
            story.error(f"The story broke off: {error}")
    return story.close(CLAIMS)


def _end_in_order(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in _ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Entry point; returns the exit code."""
    argparse.ArgumentParser(
        prog="demo", description="The main job, played with real processes in a temporary directory."
    ).parse_args()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ✓ shows ?
    missing = missing_packages()
    if missing:
        packages = " ".join(missing)
        print(f"demo: Debian packages are missing: {packages}", file=sys.stderr)
        print(f"  Install them with: sudo apt-get install {packages}", file=sys.stderr)
        return 4
    for number in _ENDING_SIGNALS:
        signal.signal(number, _end_in_order)
    try:
        return 0 if tell(Story()) else 1
    except OSError as error:  # nowhere to print to
        with suppress(OSError):
            print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with suppress(OSError):
            print("\ninterrupted; everything was cleaned up", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
