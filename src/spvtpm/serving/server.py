"""uvicorn's server as our processes need it: it says when it is ready, ends in order, and leaves signals to be signals."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn


class OrderlyServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT. What is left to do after its end is not cut off by the signal that has ended it.

    Args:
        config: of uvicorn.
        ready: called once it takes connections.
        leaving: called when it takes no more, before it waits for those that are open.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self._leaving = leaving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._leaving()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield  # they stay so: uvicorn's own would raise the signal again, and the rest would not be done


def listen_tcp(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket at the first address that the host has.

    Raises:
        OSError: it cannot be had.
    """
    family, *_others, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server((str(address[0]), port), family=family, backlog=backlog)
