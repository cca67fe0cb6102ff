"""The launch secret: how a VM gets its key from the secure processor, once for each boot.

Secure processors inject secrets into a VM's encrypted memory before it runs (SEV: LAUNCH_SECRET). Where there is no encrypted
memory, a unix socket stands for that: whoever connects first, and runs as the VM's user, reads the 32 bytes of the VM key, and
then the end of the stream. Everybody else reads the end at once, and the VM's owner can see that somebody has tried.

Format: docs/formats/hypervisor-messages.md.
"""

from __future__ import annotations

from typing import Final

from spvtpm.wire.mailbox import KEY_BYTES

LAUNCH_SECRET_BYTES: Final = KEY_BYTES

SUFFIX: Final = ".secret.sock"
"""The socket is named after the VM's id, beside its interface's."""
