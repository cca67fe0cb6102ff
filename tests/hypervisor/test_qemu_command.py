"""QEMU's command line, and which images it names; what a guest says on its serial console, kept within bounds."""

from __future__ import annotations

import os
import uuid
from itertools import pairwise
from pathlib import Path

import pytest

from spvtpm.hypervisor.config import QemuConfig, load_config
from spvtpm.hypervisor.qemu_command import Images, find_images, qemu_command
from spvtpm.hypervisor.qemu_firmware import Firmware, provide_variables
from spvtpm.hypervisor.serial_log import MAX_BYTES, SerialLog
from spvtpm.hypervisor.virtual_machine import Boot
from spvtpm.wire.errors import ConfigError
from spvtpm.wire.platform_errors import MachineFailed

VM = uuid.uuid4()
DISK = Images(kernel=None, initramfs=None, disk=Path("/d"))


def test_a_vms_own_images_come_before_those_of_all(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    config = QemuConfig(kernel="vmlinuz")
    for name in ("default.initramfs", f"{VM}.initramfs", f"{VM}.qcow2"):
        (images / name).touch()

    assert find_images(config, tmp_path, VM) == Images(
        tmp_path / "vmlinuz", images / f"{VM}.initramfs", images / f"{VM}.qcow2"
    )
    assert find_images(config, tmp_path, uuid.uuid4()) == Images(
        tmp_path / "vmlinuz", images / "default.initramfs", None
    )
    assert find_images(QemuConfig(), tmp_path, VM) == Images(None, None, images / f"{VM}.qcow2")
    with pytest.raises(MachineFailed, match="nothing to boot"):
        find_images(QemuConfig(), tmp_path, uuid.uuid4())


def test_a_comma_in_a_path_is_no_option() -> None:
    own, interface = Path("/a,readonly=on/machine"), Path("/b,server=on.sock")
    command = qemu_command(
        QemuConfig(), Images(None, None, Path("/c,if=none")), own, Boot(1, interface, None, resumes=False)
    )
    assert "unix:/a,,readonly=on/machine/qmp.sock,server=on,wait=off" in command
    assert "socket,id=vtpm,path=/b,,server=on.sock" in command
    assert "file=/c,,if=none,format=qcow2,if=virtio" in command


def test_firmware_has_its_code_and_its_variables_or_is_missed_by_name(tmp_path: Path) -> None:
    config = QemuConfig(kernel="vmlinuz", firmware="code", firmware_variables="variables")
    (tmp_path / "code").touch()
    with pytest.raises(MachineFailed, match=r"variables, which agent\.toml names as firmware_variables"):
        find_images(config, tmp_path, VM)
    (tmp_path / "variables").touch()
    assert find_images(config, tmp_path, VM).firmware == Firmware(tmp_path / "code", tmp_path / "variables")
    (tmp_path / "code").unlink()
    with pytest.raises(MachineFailed, match=r"code, which agent\.toml names as firmware;"):
        find_images(config, tmp_path, VM)


def test_code_is_shared_and_read_only_and_variables_are_the_vms_own_and_kept(tmp_path: Path) -> None:
    firmware = Firmware(Path("/c,1"), tmp_path / "template")
    own = tmp_path / "vm" / "machine"
    images = Images(Path("/k"), None, None, firmware)
    command = qemu_command(QemuConfig(), images, own, Boot(1, None, None, resumes=False))
    assert "if=pflash,unit=0,format=raw,file=/c,,1,readonly=on" in command
    assert f"if=pflash,unit=1,format=raw,file={tmp_path}/vm/firmware-variables" in command

    variables = tmp_path / "variables"
    firmware.template.write_bytes(b"new")
    provide_variables(firmware, variables, os.geteuid())
    assert (variables.read_bytes(), variables.stat().st_mode & 0o777) == (b"new", 0o600)
    variables.write_bytes(b"written")
    provide_variables(firmware, variables, os.geteuid())
    assert variables.read_bytes() == b"written"


def test_code_without_variables_is_no_firmware(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('sp = "sp"\n[qemu]\nfirmware = "code"\n')
    with pytest.raises(ConfigError, match="both firmware and firmware_variables"):
        load_config(path)


@pytest.mark.parametrize("accelerator", ["auto", "kvm", "tcg"])
def test_a_guest_has_no_network_reboots_only_with_its_vtpm_and_starts_no_process(accelerator: str) -> None:
    command = qemu_command(
        QemuConfig(accelerator=accelerator),  # type: ignore[arg-type]
        DISK,
        Path("/m"),
        Boot(1, None, None, resumes=False),
    )
    pairs = set(pairwise(command))
    assert {("-nic", "none"), ("-action", "reboot=shutdown")} <= pairs
    assert "spawn=deny" in command[command.index("-sandbox") + 1]
    wanted = {"auto": {"kvm", "tcg"}}.get(accelerator, {accelerator})
    assert {word for option, word in pairs if option == "-accel"} == wanted
    assert "ivshmem" not in " ".join(command)


@pytest.mark.attack("A23")
def test_a_guest_that_talks_without_end_fills_two_files_and_no_more(tmp_path: Path) -> None:
    serial = SerialLog(tmp_path / "serial")
    for _ in range(5):
        serial.add("x" * (MAX_BYTES - 1))
        serial.add("y" * 10)
    assert {path.name for path in tmp_path.iterdir()} <= {"serial", "serial.old"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * (2 * MAX_BYTES)


def test_nothing_that_acts_on_a_terminal_is_kept(tmp_path: Path) -> None:
    SerialLog(tmp_path / "serial").add("login:\x1b]0;owned\x07 \x9b2J\r\nok\tä\n")
    assert (tmp_path / "serial").read_text() == "login:]0;owned 2J\nok\tä\n"
