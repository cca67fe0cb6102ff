"""A worker's whole life, played in the zygote before it forks, with a TPM that nobody keeps.

What Python and OpenSSL make on first use is then made once, in memory that all workers share, and not in each of them while
a guest waits.
"""

from __future__ import annotations

import os
import socket

from spvtpm.processor.worker import worker
from spvtpm.processor.worker.messages import Committed, DirectPort, Endorsed, Park, PowerOff, Start, ToWorker, encode
from spvtpm.wire import crb
from spvtpm.wire.ek_templates import ECC_P256, ECC_P384
from spvtpm.wire.framing import encode_frame

_ROUNDS = 12
"""Python adapts a function's code to its use within its first eight calls. Source: PEP 659, "Implementation"."""

_EKS = (ECC_P256, ECC_P384)
"""No RSA key: it takes a while, and the TPM's self-test has warmed that up."""

_ENDORSED = Endorsed([bytes(900)] * len(_EKS), (bytes(900), bytes(900), bytes(900)))
"""As long as certificates are."""

_LIVES: tuple[tuple[ToWorker, ...], ...] = (
    (Committed(), PowerOff(), Committed(), Committed()),
    (Committed(), Park(only_if_idle=False)),
)
"""What the SP says after `Start`: what a whole life asks for is answered before it is asked for."""


def rehearse() -> None:
    """Lives `_ROUNDS` lives."""
    for number in range(_ROUNDS):
        _live(_LIVES[number % len(_LIVES)])


def _live(orders: tuple[ToWorker, ...]) -> None:
    start = Start(DirectPort(bytes(16), bytes(16), bytes(32)))
    flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
    memory, *doorbells = os.memfd_create("rehearsal", os.MFD_CLOEXEC), os.eventfd(0, flags), os.eventfd(0, flags)
    os.ftruncate(memory, crb.MEMORY_BYTES)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_frame(encode(_ENDORSED)))
        socket.send_fds(ours, [b"\0"], [memory, *doorbells])
        for order in (start, *orders):
            ours.sendall(encode_frame(encode(order)))
        ours.shutdown(socket.SHUT_WR)
        worker.run(theirs, [], blank=_EKS)
    for descriptor in (memory, *doorbells):
        os.close(descriptor)
