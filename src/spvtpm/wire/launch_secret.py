"""The launch secret: how a VM gets its key from the secure processor, once for each boot.

Secure processors inject secrets into a VM's encrypted memory before it runs (SEV: LAUNCH_SECRET). Where there is no encrypted
memory, a unix socket stands for that: whoever connects first, and runs as the VM's user, reads the secret, and then the end of
the stream. Everybody else reads the end at once, and the VM's owner can see that somebody has tried.

    VM key 32 bytes                                                in most boots
    VM key 32 bytes, handoff id 16 bytes, stop nonce 32 bytes      where a VM goes on that has come from another host

The second form names the one memory that belongs to the vTPM: hypervisors keep memory, and could give an older one.

Format: docs/formats/hypervisor-messages.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from spvtpm.wire.errors import VmKeyError
from spvtpm.wire.mailbox import KEY_BYTES
from spvtpm.wire.memory_records import HANDOFF_BYTES, STOP_NONCE_BYTES

MAX_LAUNCH_SECRET_BYTES: Final = KEY_BYTES + HANDOFF_BYTES + STOP_NONCE_BYTES

SUFFIX: Final = ".secret.sock"
"""The socket is named after the VM's id, beside its interface's."""


@dataclass(frozen=True, slots=True)
class ComingMemory:
    """Which memory a VM goes on with that has come from another host.

    Attributes:
        handoff_id: in which it came, 16 bytes.
        stop_nonce: of the moment in which its vTPM was stopped there, 32 bytes.
    """

    handoff_id: bytes
    stop_nonce: bytes


@dataclass(frozen=True, slots=True)
class LaunchSecret:
    """What a VM gets for a boot.

    Attributes:
        vm_key: 32 bytes; not in the `repr`.
        memory: the one to go on with; None: none that has come from another host.
    """

    vm_key: bytes = field(repr=False)
    memory: ComingMemory | None = None

    def encode(self) -> bytes:
        """32 or 80 bytes."""
        coming = b"" if self.memory is None else self.memory.handoff_id + self.memory.stop_nonce
        return self.vm_key + coming


def parse_launch_secret(data: bytes) -> LaunchSecret:
    """Reads it.

    Raises:
        VmKeyError: it has another length.
    """
    if len(data) == KEY_BYTES:
        return LaunchSecret(data)
    if len(data) != MAX_LAUNCH_SECRET_BYTES:
        raise VmKeyError(f"a launch secret has {KEY_BYTES} or {MAX_LAUNCH_SECRET_BYTES} bytes, not {len(data)}")
    key, rest = data[:KEY_BYTES], data[KEY_BYTES:]
    return LaunchSecret(key, ComingMemory(rest[:HANDOFF_BYTES], rest[HANDOFF_BYTES:]))
