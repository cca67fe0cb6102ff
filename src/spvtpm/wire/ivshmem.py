"""How the SP hands shared memory and doorbells to a VM: the server protocol of QEMU's ivshmem device.

The SP is the server and, as a peer, number 1; the VM is number 0, for QEMU saves the memory of no other's machine. Each has
one interrupt vector, an eventfd. A message is a 64-bit little-endian signed number, some with one file descriptor
(SCM_RIGHTS):

    0               protocol version
    0               the client's own number
    -1   + memory   the shared memory
    1    + doorbell rings the SP
    0    + doorbell rings the VM

Sans-IO. Source: QEMU, docs/specs/ivshmem-spec.rst, "The ivshmem client-server protocol".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from spvtpm.wire.errors import InterfaceError

PROTOCOL_VERSION = 0
SP_PEER = 1
VM_PEER = 0
_SHARED_MEMORY = -1
_NUMBER = struct.Struct("<q")
MESSAGE_BYTES = _NUMBER.size

REFUSAL = _NUMBER.pack(-1)
"""A protocol version that there is not: said to a client before its connection is closed, for QEMU 7.2 waits for ever for
the offer of one that is closed without a word."""


class Offer(NamedTuple):
    """The three file descriptors of an interface.

    Attributes:
        memory: memory file of `crb.MEMORY_BYTES` bytes.
        sp_doorbell: eventfd; written by the VM, read by the SP.
        vm_doorbell: eventfd; written by the SP, read by the VM.
    """

    memory: int
    sp_doorbell: int
    vm_doorbell: int


def encode_offer(offer: Offer) -> list[tuple[bytes, int | None]]:
    """What the server sends to a client that has connected: messages in order, each with the descriptor that goes along."""
    messages = (
        (PROTOCOL_VERSION, None),
        (VM_PEER, None),
        (_SHARED_MEMORY, offer.memory),
        (SP_PEER, offer.sp_doorbell),
        (VM_PEER, offer.vm_doorbell),
    )
    return [(_NUMBER.pack(number), descriptor) for number, descriptor in messages]


class OfferParser:
    """The client's side: takes messages as they arrive until the offer is whole.

    Takes the first doorbell of each side; a server that has more vectors or peers is no SP of ours.
    """

    def __init__(self) -> None:
        self._own_number: int | None = None
        self._version_seen = False
        self._memory: int | None = None
        self._sp_doorbell: int | None = None

    def feed(self, message: bytes, descriptor: int | None) -> Offer | None:
        """Takes one message; returns the offer once it is complete.

        Args:
            message: 8 bytes.
            descriptor: the descriptor that came with it, if any. The caller closes what an error leaves over.

        Raises:
            InterfaceError: the server does not speak this protocol, or offers something else than one vTPM interface.
        """
        if len(message) != MESSAGE_BYTES:
            raise InterfaceError("the connection ended in the middle of the interface's offer")
        (number,) = _NUMBER.unpack(message)
        if not self._version_seen:
            if message == REFUSAL:
                raise InterfaceError("the secure processor refused this process the interface (see its log)")
            if number != PROTOCOL_VERSION or descriptor is not None:
                raise InterfaceError(f"the server speaks version {number} of the ivshmem protocol, not version 0")
            self._version_seen = True
        elif self._own_number is None:
            if not 0 <= number <= 0xFFFF or number == SP_PEER or descriptor is not None:
                raise InterfaceError("the server gave this client no usable number")
            self._own_number = number
        elif descriptor is None:
            raise InterfaceError("the server sent a message without the descriptor that belongs to it")
        elif self._memory is None and number == _SHARED_MEMORY:
            self._memory = descriptor
        elif self._memory is not None and self._sp_doorbell is None and number == SP_PEER:
            self._sp_doorbell = descriptor
        elif self._memory is not None and self._sp_doorbell is not None and number == self._own_number:
            return Offer(self._memory, self._sp_doorbell, descriptor)
        else:
            raise InterfaceError("the server's offer is out of order")
        return None
