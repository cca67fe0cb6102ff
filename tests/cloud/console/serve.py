"""Serves a platform's application on a socket that is given: `python -m tests.cloud.console.serve DATABASE_URL FD`."""

from __future__ import annotations

import sys
from types import FrameType

import uvicorn

from spvtpm.cloud.api import build_app
from spvtpm.cloud.config import CloudConfig
from spvtpm.cloud.database import Database
from spvtpm.cloud.platform import Platform


class Server(uvicorn.Server):
    """Tells the platform's streams when it is to end."""

    def __init__(self, platform: Platform, descriptor: int) -> None:
        app = build_app(platform)
        super().__init__(
            uvicorn.Config(
                app, fd=descriptor, log_level="warning", lifespan="off", proxy_headers=False
            )  # as `service.py`
        )
        self._platform = platform

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._platform.leave()
        super().handle_exit(sig, frame)


def main() -> None:
    url, descriptor = sys.argv[1:]
    platform = Platform(CloudConfig(), Database(url))
    try:
        Server(platform, int(descriptor)).run()
    finally:
        platform.close()


if __name__ == "__main__":
    main()
