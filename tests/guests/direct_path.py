"""Guests on the direct path: in their initramfs are this Python, the package, and the tools of tpm2-tools."""

from __future__ import annotations

import py_compile
import re
import subprocess
import sys
import uuid
from importlib.util import cache_from_source
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guests.kernel import Initramfs
from tests.guests.machine import Guest
from tests.harness import RunningSp

_LISTING = """
import importlib.util, runpy, sys
import spvtpm.cli, spvtpm.guest.device
print(importlib.util.find_spec("spvtpm.cli.__main__").origin)
for module in sys.modules.values():
    if getattr(module, "__file__", None):
        print(module.__file__)
"""

_INIT = """
. /etc/start
chmod 0600 /etc/spvtpm/vm.key
start() { $PYTHON -m spvtpm.cli guest device --key /etc/spvtpm/vm.key & DEVICE=$!; }
(start; wait $DEVICE; echo "device ended $?") &
while read -r line; do eval "$line"; done
"""

TOOLS = "/usr/bin/tpm2"


def _add_python(initramfs: Initramfs, scratch: Path) -> tuple[str, str]:
    """This interpreter, and all modules that `spvtpm guest device` imports; gives its path, and PYTHONPATH.

    Modules come compiled and without their sources: there are no times in an initramfs by which Python could see that what it
    has compiled is that source.
    """
    python = Path(sys.base_exec_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    initramfs.add_program(python)
    listed = subprocess.run([sys.executable, "-c", _LISTING], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        path = Path(line)
        if path.suffix == ".py":
            cached = Path(cache_from_source(path))
            compiled = cached if cached.exists() else Path(str(py_compile.compile(str(path), str(scratch))))
            initramfs.add(str(path.with_suffix(".pyc")).lstrip("/"), compiled.read_bytes())
        elif path.suffix == ".so":
            initramfs.add_program(path)
    sources = Path(__file__).parents[2] / "src"
    return str(python), ":".join([str(sources), *(path for path in sys.path if path.endswith("site-packages"))])


def _add_tools(initramfs: Initramfs) -> None:
    initramfs.add_program(Path(TOOLS))
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    library = re.search(r"=> (/\S+/libtss2-tcti-device\.so\.0)$", found, re.MULTILINE)
    assert library is not None, "libtss2-tcti-device is missing"
    initramfs.add_program(Path(library[1]))


def make_initramfs(path: Path, vm_key: bytes) -> Path:
    """The image of one VM, with the key that its owner put in."""
    image = Initramfs(_INIT)
    commands = image.add_modules("tpm_vtpm_proxy")
    python, python_path = _add_python(image, path.with_suffix(".pyc"))
    _add_tools(image)
    image.add("etc/start", f"{commands}export PYTHONPATH={python_path} PYTHON={python}\n".encode())
    image.add("etc/spvtpm/vm.key", vm_key)
    return image.write(path)


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
        assert self.guest.wait_for(r"serving /dev/tpm0\n|device ended \d+\n")[0].startswith("serving"), self.guest.said

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
