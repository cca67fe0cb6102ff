"""libvirt, with the XML that docs/how-to/attach-qemu.md gives: a session of a user who is not the secure processor's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.guests.kernel import KERNEL, Initramfs, needs_guests
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
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._environment = {**os.environ, "HOME": str(directory), "XDG_RUNTIME_DIR": str(directory)}

    def do(self, *words: str) -> str:
        """A command of virsh; what it says."""
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if is_root() else {}
        command = ["virsh", "-c", "qemu:///session", *words]
        done = subprocess.run(  # type: ignore[call-overload]
            command, env=self._environment, capture_output=True, text=True, timeout=60, **user
        )
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    def end(self) -> None:
        """Ends the daemon; it would wait for more."""
        with suppress(FileNotFoundError):
            pid = int((self._directory / "libvirt" / "libvirtd.pid").read_text())
            process = os.pidfd_open(pid)
            os.kill(pid, signal.SIGTERM)
            has_ended(process)


def test_a_guest_of_libvirts_has_its_vtpm_as_an_external_backend(directory: Path) -> None:
    shutil.copyfile(KERNEL, directory / "vmlinuz")
    Initramfs("echo version=$(cat /sys/class/tpm/tpm0/tpm_version_major)").write(directory / "initramfs")
    os.mkfifo(directory / "console.in")
    os.mkfifo(directory / "console.out")
    for file in directory.iterdir():
        file.chmod(0o666)
    uids = f"allowed_uids = [{os.geteuid()}, {NOBODY}]\n" if is_root() else None
    session = Session(directory)
    with RunningSp(directory / "sp", uids) as sp:
        path = sp.launch_emulated()[1]
        (tpm,) = re.findall(r"<tpm .*?</tpm>", PAGE.read_text(), re.DOTALL)
        tpm = re.sub(r"path='[^']*'", f"path='{path}'", tpm)
        domain = directory / "domain.xml"
        domain.write_text(_DOMAIN.format(directory=directory, qemu=shutil.which("qemu-system-x86_64"), tpm=tpm))
        console = os.open(directory / "console.out", os.O_RDONLY | os.O_NONBLOCK)
        try:
            session.do("create", str(domain))
            os.set_blocking(console, True)
            with os.fdopen(console, errors="replace") as lines:
                assert "version=2" in lines.read()
        finally:
            session.end()
