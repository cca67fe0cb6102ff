"""Guests on the direct path: their initramfs has what the package's hook for initramfs-tools puts there, and tpm2-tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from spvtpm.files import create_file
from tests.guests.kernel import HOOK_FUNCTIONS, Initramfs
from tests.guests.machine import Guest
from tests.harness import RunningSp

_ROOT = Path(__file__).parents[2]
_INITRAMFS_TOOLS = _ROOT / "deploy" / "guest" / "initramfs-tools"
_HERE = {
    "/usr/share/initramfs-tools/hook-functions": HOOK_FUNCTIONS,
    "/opt/spvtpm": _ROOT / ".venv",
}
"""What the scripts name, and where it is here."""

_INIT = f"""
. /etc/modules.sh
mount -t tmpfs -o mode=0755 run /run
export PYTHONPATH={_ROOT}/src
start() {{ {_ROOT}/.venv/bin/spvtpm guest device --key /etc/spvtpm/vm.key & DEVICE=$!; }}
. /etc/premount.sh
"""

_SHELL = 'while read -r line; do eval "$line"; done'

TOOL = shutil.which("tpm2")


def _script(path: Path) -> str:
    """A script of initramfs-tools, for this clone."""
    text = path.read_text()
    for there, here in _HERE.items():
        text = text.replace(there, str(here))
    return text


def _add_python(initramfs: Initramfs, scratch: Path, vm_key: bytes) -> None:
    """What the hook adds. Only the kernel's modules come from elsewhere: none are installed here."""
    tree = scratch / "tree"
    tree.mkdir(parents=True)
    create_file(scratch / "vm.key", vm_key)
    hook = _script(_INITRAMFS_TOOLS / "hooks" / "spvtpm")
    for line, instead in (
        ("manual_add_modules tpm_vtpm_proxy\n", ""),
        ("key=/etc/spvtpm/vm.key\n", f"key={scratch / 'vm.key'}\n"),
    ):
        assert line in hook
        hook = hook.replace(line, instead)
    environment = {"PATH": os.environ["PATH"], "DESTDIR": str(tree), "verbose": "n"}
    subprocess.run(["sh", "-c", hook, "spvtpm"], env=environment, check=True, timeout=120)
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            initramfs.add_link(name, str(path.readlink()))
        elif path.is_file():
            initramfs.add(name, path.read_bytes(), program=os.access(path, os.X_OK))


def _add_tools(initramfs: Initramfs) -> None:
    assert TOOL is not None
    initramfs.add_program(Path(TOOL))
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    library = re.search(r"=> (/\S+/libtss2-tcti-device\.so\.0)$", found, re.MULTILINE)
    assert library is not None, "libtss2-tcti-device is missing"
    initramfs.add_program(Path(library[1]))


def make_initramfs(scratch: Path, vm_key: bytes, job: str = _SHELL) -> Path:
    """The image of one VM, with the key that its owner put in.

    Args:
        scratch: a directory for it; does not exist yet.
        vm_key: 32 bytes.
        job: what the guest does when it has its TPM.
    """
    image = Initramfs(_INIT + job)
    _add_python(image, scratch, vm_key)
    _add_tools(image)
    modules = image.add_modules("tpm_vtpm_proxy", "button", "evdev")
    image.add("etc/modules.sh", f"{modules}chmod 0600 /etc/spvtpm/vm.key\n".encode())
    image.add("etc/premount.sh", _script(_INITRAMFS_TOOLS / "scripts" / "init-premount" / "spvtpm").encode())
    return image.write(scratch / "initramfs")


def interface_devices(interface: Path) -> list[str]:
    """QEMU's arguments for a vTPM's interface."""
    return ["-chardev", f"socket,path={interface},id=vtpm", "-device", "ivshmem-doorbell,chardev=vtpm,vectors=1"]


class DirectGuest:
    """A guest whose vTPM is on the direct path. Ends with the block.

    Args:
        sp: where its vTPM is, running.
        vm_id: the VM.
        initramfs: its image.
    """

    def __init__(self, sp: RunningSp, vm_id: uuid.UUID, initramfs: Path) -> None:
        self.guest = Guest(initramfs, interface_devices(sp.interface(vm_id)), memory_mib=512)
        self._commands = 0

    def await_tpm(self) -> None:
        """Returns once the kernel has its TPM."""
        said = self.guest.wait_for(r"serving /dev/tpm0\n|this system has no TPM\n")[0]
        assert said.startswith("serving"), self.guest.said

    def remove_python(self) -> None:
        """As it is when the root file system has taken over: what was in the initramfs runs on, and its files are gone."""
        assert self.run(f"rm -rf {sysconfig.get_path('stdlib')} {_ROOT}") == (0, "")

    def run(self, command: str) -> tuple[int, str]:
        """Runs a command of its shell: exit code, and what it said."""
        self._commands += 1
        begin, end = f"begin-{self._commands}-", f"end-{self._commands}-"
        self.guest.enter(f"echo {begin}$((0)); {command}; echo {end}$?")
        code = int(self.guest.wait_for(rf"{end}(\d+)\n")[1])
        _, _, said = self.guest.said.partition(f"{begin}0\n")
        return code, said[: said.index(end)]

    def tool(self, command: str) -> str:
        """What a tool of tpm2-tools says, that has to succeed: `tpm2_pcrread sha256:16`."""
        code, said = self.run(f"tpm2 {command.removeprefix('tpm2_')} -T device:/dev/tpmrm0")
        assert code == 0, said
        return said

    def __enter__(self) -> Self:
        self.guest.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.guest.__exit__(kind, error, trace)
