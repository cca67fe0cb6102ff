"""libvirt: with the XML that docs/how-to/attach-qemu.md gives, and with our programs in place of swtpm's. A session of a user
who is not the secure processor's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import spvtpm
from tests.guests.kernel import KERNEL, QEMU, Initramfs, needs_guests
from tests.harness import RunningSp, has_ended, is_root

NOBODY = 65534
"""Somebody else, whom the system knows. Root has no session in libvirt."""


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "attach-qemu.md"

pytestmark = [
    needs_guests,
    pytest.mark.claim("B1"),
    pytest.mark.skipif(
        shutil.which("virsh") is None or shutil.which("libvirtd") is None,
        reason="libvirt is not installed (packages libvirt-clients, libvirt-daemon, libvirt-daemon-driver-qemu)",
    ),
]

_DOMAIN = """
<domain type='qemu'>
  <name>guest</name><memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{directory}/vmlinuz</kernel><initrd>{directory}/initramfs</initrd>
    <cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>{qemu}</emulator>
    <serial type='pipe'><source path='{directory}/console'/></serial>
    <memballoon model='none'/>
    {tpm}
  </devices>
</domain>
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place that the session's user can use."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        place = Path(path)
        if is_root():
            os.chown(place, NOBODY, NOBODY)
        place.chmod(0o711)
        yield place


class Session:
    """A user's libvirt, which starts with the first command.

    Args:
        directory: its home.
        programs: where it looks for programs first.
    """

    def __init__(self, directory: Path, programs: Path | None = None) -> None:
        self._directory = directory
        path = os.environ["PATH"] if programs is None else f"{programs}:{os.environ['PATH']}"
        self._environment = {**os.environ, "HOME": str(directory), "XDG_RUNTIME_DIR": str(directory), "PATH": path}

    def do(self, *words: str) -> None:
        """A command of virsh."""
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if is_root() else {}
        command = ["virsh", "-c", "qemu:///session", *words]
        done = subprocess.run(  # type: ignore[call-overload]
            command, env=self._environment, capture_output=True, text=True, timeout=60, **user
        )
        assert done.returncode == 0, done.stderr

    def end(self) -> None:
        """Ends the daemon; it would wait for more."""
        with suppress(FileNotFoundError):
            pid = int((self._directory / "libvirt" / "libvirtd.pid").read_text())
            process = os.pidfd_open(pid)
            os.kill(pid, signal.SIGTERM)
            has_ended(process)


def console_of(directory: Path, session: Session, tpm: str) -> str:
    """What a guest with this TPM says from its start to its end."""
    shutil.copyfile(KERNEL, directory / "vmlinuz")
    Initramfs("echo version=$(cat /sys/class/tpm/tpm0/tpm_version_major)").write(directory / "initramfs")
    os.mkfifo(directory / "console.in")
    os.mkfifo(directory / "console.out")
    domain = directory / "domain.xml"
    domain.write_text(_DOMAIN.format(directory=directory, qemu=QEMU, tpm=tpm))
    for name in ("vmlinuz", "initramfs", "console.in", "console.out", "domain.xml"):
        (directory / name).chmod(0o666)
    console = os.open(directory / "console.out", os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(console, errors="replace") as lines:
        try:
            session.do("create", str(domain))
            os.set_blocking(console, True)
            return lines.read()
        finally:
            session.end()


def test_a_guest_of_libvirts_has_its_vtpm_as_an_external_backend(directory: Path) -> None:
    uids = f"allowed_uids = [{os.geteuid()}, {NOBODY}]\n" if is_root() else None
    with RunningSp(directory / "sp", uids) as sp:
        (tpm,) = re.findall(r"<tpm .*?</tpm>", PAGE.read_text(), re.DOTALL)
        tpm = re.sub(r"path='[^']*'", f"path='{sp.launch_emulated()[1]}'", tpm)
        assert "version=2" in console_of(directory, Session(directory), tpm)


def python_for_the_session(directory: Path) -> str:
    """One that the session's user can execute, and that has what is installed here: root's own may be out of his reach."""
    if not is_root():
        return sys.executable
    environment = directory / "environment"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text(f"{Path(spvtpm.__file__).parents[1]}\n{sysconfig.get_path('platlib')}\n")
    python = str(environment / "bin" / "python")
    tried = subprocess.run(
        [python, "-c", "import spvtpm.swtpm.main"], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True
    )
    if tried.returncode != 0:
        pytest.skip("the session's user can execute no Python that has what is installed here")
    return python


@pytest.mark.skipif(shutil.which("swtpm_ioctl") is None, reason="libvirt wants swtpm_ioctl, too (package swtpm-tools)")
def test_libvirt_takes_our_programs_for_swtpm_and_swtpm_setup(directory: Path) -> None:
    programs, python = directory / "programs", python_for_the_session(directory)
    programs.mkdir()
    for name, module in (("swtpm", "spvtpm.swtpm"), ("swtpm_setup", "spvtpm.swtpm.setup")):
        (programs / name).write_text(f'#!/bin/sh\nexec {python} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0' persistent_state='yes'/></tpm>"
    assert "version=2" in console_of(directory, Session(directory, programs), tpm)
    assert list(directory.rglob("nv.db")), "it was one of ours"
