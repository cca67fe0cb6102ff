"""The secure processor's configuration: one TOML file, one frozen struct, nothing from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import ConfigError
from spvtpm.wire.messages import Uid


class SpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sp.toml`; every key may be left out.

    Attributes:
        allowed_uids: users whose processes may command the SP and take interfaces; the user that runs it if left out.
        vm_uids: the first of the user ids that belong to VMs, and how many there are; none: VMs run as who may command.
        max_vms: security blocks at a time.
        max_vms_of_one_owner: of them, those of one owner.
        admission_required: whether a VM can be provisioned only once the hypervisor has announced it.
        park_after_s: an active vTPM that did nothing for this long, at most twice as long, is parked.
        spare_workers: sandboxed processes kept ready for waking, and as many with a blank TPM for creating.
    """

    allowed_uids: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 32)]], Meta(max_length=64)] = msgspec.field(
        default_factory=lambda: [os.geteuid()]
    )
    vm_uids: Annotated[list[Uid], Meta(max_length=2)] = []  # msgspec copies it
    max_vms: Annotated[int, Meta(ge=1, le=100_000)] = 4096
    max_vms_of_one_owner: Annotated[int, Meta(ge=1, le=100_000)] = 1024
    admission_required: bool = False
    park_after_s: Annotated[float, Meta(ge=0.05, le=86_400)] = 60.0
    spare_workers: Annotated[int, Meta(ge=0, le=64)] = 2

    def users_of_vms(self) -> range:
        """The user ids that belong to VMs."""
        first, count = self.vm_uids or (0, 0)
        return range(first, first + count)


DEFAULT_TOML = """\
# Configuration of this secure processor. Every key may be left out.
# allowed_uids = [0]    # users who may command it and take interfaces; default: the user that runs it
# vm_uids = [200000, 1000]      # user ids that belong to VMs: the first, and how many; default: none
# max_vms = 4096        # VM security blocks at a time
# max_vms_of_one_owner = 1024   # of them, those of one owner
# admission_required = false    # whether the hypervisor announces each VM before its owner can provision it
# park_after_s = 60.0   # an active vTPM idle for this long gives up its process
# spare_workers = 2     # sandboxed processes kept ready for waking, and as many with a blank TPM for creating
"""


def load_config(path: Path) -> SpConfig:
    """Reads the file; without one everything has its default.

    Raises:
        ConfigError: it cannot be read, or a key is unknown or out of bounds.
    """
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=SpConfig)
    except FileNotFoundError:
        return SpConfig()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (*UNDECODABLE, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if len(config.vm_uids) not in (0, 2):
        raise ConfigError(f"{path}: vm_uids are two numbers: the first user id, and how many")
    return config
