"""What guests boot: Debian's kernel, as scripts/guest-kernel.sh has taken it out of its package, and an initramfs."""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from pathlib import Path

import pytest

QEMU = shutil.which("qemu-system-x86_64")

_GUEST = Path(__file__).parents[2] / ".venv" / "guest"
KERNEL = _GUEST / "vmlinuz"
_MODULES = _GUEST / "modules"
BUSYBOX = _GUEST / "busybox"
HOOK_FUNCTIONS = _GUEST / "hook-functions"

FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")

needs_guests = pytest.mark.skipif(
    QEMU is None or not (_GUEST / "ready").exists(),
    reason="QEMU (package qemu-system-x86) or the guests' kernel is missing: scripts/setup.sh dev gets both",
)

needs_firmware = pytest.mark.skipif(
    not FIRMWARE.exists(), reason="guests' firmware (package ovmf) is missing: scripts/setup.sh dev gets it"
)

_DIRECTORY = 0o040755
_PROGRAM = 0o100755
_FILE = 0o100644
_LINK = 0o120777

_PRELUDE = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t securityfs securityfs /sys/kernel/security
exec </dev/ttyS0 >/dev/ttyS0 2>&1
"""


class Initramfs:
    """The whole file system of a guest, in memory. It has busybox with all its commands, /proc, /sys and /dev.

    Args:
        init: shell script that the guest runs, on its serial console; at its end the guest is powered off.
    """

    def __init__(self, init: str) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}
        for directory in ("proc", "sys", "dev", "run", "tmp"):
            self._put(directory, _DIRECTORY, b"")
        self.add("bin/busybox", BUSYBOX.read_bytes(), program=True)
        self.add("init", (_PRELUDE + init + "\npoweroff -f\n").encode(), program=True)

    def add(self, name: str, content: bytes, *, program: bool = False) -> None:
        """A file, and the directories above it.

        Args:
            name: its path without the first slash.
            content: its bytes.
            program: whether it can be executed.
        """
        self._put(name, _PROGRAM if program else _FILE, content)

    def add_link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._put(name, _LINK, target.encode())

    def add_program(self, path: Path) -> None:
        """A program of this machine at the same place, with the libraries that it is linked to."""
        linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        for file in {str(path), *re.findall(r"(/\S+) \(0x", linked)}:
            self.add(file.lstrip("/"), Path(file).read_bytes(), program=True)

    def add_modules(self, *names: str) -> str:
        """Modules of the kernel, and what they depend on.

        Args:
            names: as `modprobe` takes them.

        Returns:
            The commands that load them.
        """
        files = {path.name.partition(".")[0].replace("-", "_"): path for path in _MODULES.rglob("*.ko*")}
        loaded: list[str] = []

        def load(name: str) -> None:
            if name in loaded or name not in files:  # what is no file is compiled into the kernel
                return
            packed = files[name].read_bytes()
            content = lzma.decompress(packed) if files[name].suffix == ".xz" else packed
            # Source: Linux, scripts/mod/modpost.c: the section .modinfo has strings, one of them depends=a,b.
            depends = re.search(rb"\0depends=([^\0]*)\0", content)
            for needed in depends[1].decode().split(",") if depends is not None else []:
                load(needed.replace("-", "_"))
            loaded.append(name)
            self.add(f"modules/{name}.ko", content)

        for name in names:
            load(name.replace("-", "_"))
        return "".join(f"insmod /modules/{name}.ko\n" for name in loaded)

    def write(self, path: Path) -> Path:
        """Writes it for QEMU's `-initrd`; gives the path back."""
        # Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst, "newc".
        with path.open("wb") as file:
            for number, (name, (mode, content)) in enumerate([*self._entries.items(), ("TRAILER!!!", (0, b""))], 1):
                fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
                header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
                for part in (header, content):
                    file.write(part + bytes(-len(part) % 4))
        return path

    def _put(self, name: str, mode: int, content: bytes) -> None:
        for above in reversed(Path(name).parents[:-1]):
            self._entries.setdefault(str(above), (_DIRECTORY, b""))
        self._entries[name] = mode, content
