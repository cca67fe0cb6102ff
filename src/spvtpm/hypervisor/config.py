"""The agent's configuration: one TOML file, one frozen struct."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from spvtpm.files import PUBLIC, create_file, read_file
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import ConfigError

_UserId = Annotated[int, Meta(ge=1, lt=(1 << 32) - 1)]


class QemuConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `[qemu]`.

    Attributes:
        program: QEMU.
        accelerator: `kvm`, `tcg`, or `auto`: KVM if the host has it.
        tpm: `direct`: guests have a driver for the direct path, and their VM keys; `emulator`: they see an ordinary TPM, and the
            host sees all that they do with it, if their owners allow that.
        memory_mib: each guest's memory.
        cpus: each guest's processors.
        firmware: code of UEFI firmware, from the agent's directory on; empty: QEMU's own BIOS.
        firmware_variables: the variables that belong to it, which each VM gets a copy of before its first boot.
        kernel: a Linux kernel that all guests boot, from the agent's directory on; empty: their disks boot.
        append: its command line.
        images: directory of the guests' images, from the agent's on: VM.qcow2; with a kernel, VM.initramfs or default.initramfs.
    """

    program: Annotated[str, Meta(min_length=1, max_length=4096)] = "qemu-system-x86_64"
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    tpm: Literal["direct", "emulator"] = "direct"
    memory_mib: Annotated[int, Meta(ge=64, le=1 << 20)] = 1024
    cpus: Annotated[int, Meta(ge=1, le=64)] = 1
    firmware: Annotated[str, Meta(max_length=4096)] = ""
    firmware_variables: Annotated[str, Meta(max_length=4096)] = ""
    kernel: Annotated[str, Meta(max_length=4096)] = ""
    append: Annotated[str, Meta(max_length=2048)] = "console=ttyS0"
    images: Annotated[str, Meta(min_length=1, max_length=4096)] = "images"


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`agent.toml`.

    Attributes:
        sp: state directory of the host's secure processor.
        listen: where the platform connects: a path of a unix socket, from the agent's directory on, or HOST:PORT.
        tls_certificate: with HOST:PORT: a file with the certificate and its chain, PEM; empty: no TLS.
        tls_key: a private file with the certificate's key, PEM.
        max_vms: how many VMs the host takes.
        revocation_list: a file with the vendor's newest list of revoked chips, PEM, which a VM's move needs; read each time.
            Empty: the secure processor knows one.
        vm_uids: the first of the user ids that belong to VMs, and how many there are; empty: VMs run as the agent's user.
        qemu: VMs are guests of QEMU; None: they are emulated.
    """

    sp: Annotated[str, Meta(min_length=1, max_length=4096)]
    listen: Annotated[str, Meta(min_length=1, max_length=300)] = "agent.sock"
    tls_certificate: Annotated[str, Meta(max_length=4096)] = ""
    tls_key: Annotated[str, Meta(max_length=4096)] = ""
    max_vms: Annotated[int, Meta(ge=1, le=10_000)] = 256
    revocation_list: Annotated[str, Meta(max_length=4096)] = ""
    vm_uids: Annotated[list[_UserId], Meta(max_length=2)] = []  # msgspec copies it
    qemu: QemuConfig | None = None

    def endpoint(self) -> tuple[str, int] | None:
        """Host and port, if it listens on TCP.

        Raises:
            ConfigError: `listen` names no port.
        """
        host, colon, port = self.listen.rpartition(":")
        if not colon or "/" in self.listen:
            return None
        if not host or not port.isdecimal() or not 0 <= int(port) < 1 << 16:
            raise ConfigError(f"listen: {self.listen!r} is neither HOST:PORT nor the path of a socket")
        return host.removeprefix("[").removesuffix("]"), int(port)

    def verify(self) -> None:
        """Whether what is said fits together.

        Raises:
            ConfigError: it does not.
        """
        if len(self.vm_uids) not in (0, 2):
            raise ConfigError("vm_uids are two numbers: the first user id, and how many")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("TLS needs both tls_certificate and tls_key")
        if self.endpoint() is None and self.tls_certificate:
            raise ConfigError("TLS is for HOST:PORT; who may use a unix socket, its permissions say")
        if self.qemu is not None and bool(self.qemu.firmware) != bool(self.qemu.firmware_variables):
            raise ConfigError("firmware of QEMU guests needs both firmware and firmware_variables")


_EXPLANATIONS: Final = """\
# Configuration of this host's agent. All but `sp` may be left out.
# sp = "/var/lib/spvtpm"    # state directory of the host's secure processor
# listen = "agent.sock"     # a socket's path, from this directory on, or HOST:PORT
# tls_certificate = ""      # with HOST:PORT: certificate and chain, PEM
# tls_key = ""              # its key, PEM, mode 0600
# max_vms = 256             # how many VMs the host takes
# revocation_list = ""      # the vendor's newest list of revoked chips, PEM; needed for VMs to move
# vm_uids = [200000, 1000]  # user ids that belong to VMs: the first, and how many; default: none
# [qemu]                    # VMs are guests of QEMU; without this table, they are emulated. It has to be the last
# accelerator = "auto"      # or "kvm", or "tcg"; auto: KVM if there is any
# tpm = "direct"            # or "emulator": an ordinary TPM, whose commands the host sees
# memory_mib = 1024         # each guest's memory
# cpus = 1                  # each guest's processors
# firmware = ""             # UEFI firmware: its code, "/usr/share/OVMF/OVMF_CODE_4M.fd"; default: QEMU's BIOS
# firmware_variables = ""   # and its variables, "/usr/share/OVMF/OVMF_VARS_4M.fd": each VM gets a copy
# kernel = ""               # a Linux kernel that all guests boot; default: their disks boot
# append = "console=ttyS0"  # its command line
# images = "images"         # directory: VM.qcow2; with a kernel, VM.initramfs or default.initramfs
"""

_MAX_TOKEN_BYTES: Final = 128


def write_config(path: Path, config: AgentConfig) -> None:
    """Writes a new file, with what differs from the defaults.

    Raises:
        AlreadyExists: there is one.
        StorageError: it cannot be written.
    """
    defaults = AgentConfig(sp="")
    given = {name: getattr(config, name) for name in AgentConfig.__struct_fields__}
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in given.items() if value != getattr(defaults, name)]
    create_file(path, (_EXPLANATIONS + "".join(lines)).encode(), PUBLIC)


def load_config(path: Path) -> AgentConfig:
    """Reads the file.

    Raises:
        ConfigError: it cannot be read, or makes no sense.
    """
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=AgentConfig)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (*UNDECODABLE, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    config.verify()
    return config


def read_token(path: Path) -> str:
    """What the platform has to show.

    Raises:
        StorageError: it cannot be read, or others can read it too.
        ConfigError: it is no token.
    """
    token = read_file(path, _MAX_TOKEN_BYTES + 1).decode(errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{32,128}", token):
        raise ConfigError(f"{path} has no token: 32 to {_MAX_TOKEN_BYTES} letters, digits, hyphens and underscores")
    return token
