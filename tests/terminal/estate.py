"""An owner with a keyring, chips of one fleet with real secure processors on them, and VMs that run and stop."""

from __future__ import annotations

import hashlib
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from spvtpm.terminal.desk import Desk, Wishes
from spvtpm.terminal.exports import Exported, export_vtpm
from spvtpm.terminal.imports import import_vtpm
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.terminal.whereabouts import Known, Place
from spvtpm.wire import messages
from spvtpm.wire.owner_messages import MyVm
from tests.harness import RunningSp
from tests.owner import ANYTHING
from tests.papers import DAY, der, todays_papers

VM_KEY = bytes(range(32))


def new_keyring(directory: Path, passphrase: bytes | None = None) -> Keyring:
    """A keyring that trusts today's vendor."""
    keyring = Keyring.create(directory, passphrase)
    keyring.trust_root(der(todays_papers().root.certificate))
    keyring.put_revocation_list(todays_papers().revocation_list(at=datetime.now(UTC) - DAY).encode())
    return keyring


class Estate:
    """One owner and his chips.

    Args:
        directory: for all of it.
        chips: how many.
    """

    def __init__(self, directory: Path, chips: int = 1) -> None:
        self.directory = directory
        self.keyring = new_keyring(directory / "keyring")
        self.sps = [RunningSp(directory / f"sp{number}") for number in range(chips)]

    def desk(
        self, chip: int = 0, channel: Path | None = None, wishes: Wishes | None = None, timeout_s: float = 30
    ) -> Desk:
        """The owner's desk at one of the chips, or at whatever answers at `channel`."""
        return Desk(
            self.keyring, through_socket(channel or self.sps[chip].state), wishes or Wishes(), timeout_s=timeout_s
        )

    def channel(self, chip: int = 0) -> Path:
        """A chip's channel socket."""
        return self.sps[chip].state / "run" / "channel.sock"

    def stopped_vm(self, chip: int = 0) -> uuid.UUID:
        """A new VM with a vTPM, shut down."""
        vm_id = uuid.uuid4()
        self.desk(chip).provision(vm_id, VM_KEY, ANYTHING, "mine")
        self.run_and_stop(vm_id, chip, messages.LaunchVm(vm_id=vm_id))
        return vm_id

    def run_and_stop(self, vm_id: uuid.UUID, chip: int = 0, begin: messages.Request | None = None) -> None:
        """The hypervisor boots the VM and powers it off again."""
        self.sps[chip].info(begin or messages.StartVm(vm_id=vm_id))
        self.sps[chip].info(messages.StopVm(vm_id=vm_id))

    def vtpm_of(self, vm_id: uuid.UUID, chip: int = 0) -> uuid.UUID:
        """The VM's vTPM."""
        vtpm = self.sps[chip].vm(vm_id).vtpm
        assert vtpm is not None
        return vtpm.vtpm_id

    def export(self, vm_id: uuid.UUID, name: str, chip: int = 0, channel: Path | None = None) -> Exported:
        """As the owner does it."""
        return export_vtpm(self.desk(chip, channel), vm_id, self.directory / name)

    def bring(self, vm_id: uuid.UUID, name: str, chip: int = 0, channel: Path | None = None) -> MyVm:
        """As the owner does it."""
        return import_vtpm(self.desk(chip, channel), vm_id, VM_KEY, self.directory / name)

    def place(self, vtpm_id: uuid.UUID) -> Place | None:
        """Where the keyring believes the vTPM to live."""
        known = self.keyring.known(vtpm_id)
        return None if known is None else known.place

    def known(self, vtpm_id: uuid.UUID) -> Known:
        """What the keyring remembers of it."""
        known = self.keyring.known(vtpm_id)
        assert known is not None
        return known

    def sha256(self, name: str) -> bytes:
        """Of a file."""
        return hashlib.sha256((self.directory / name).read_bytes()).digest()

    def close(self) -> None:
        """All secure processors end."""
        for sp in self.sps:
            with suppress(OSError):
                sp.kill()
