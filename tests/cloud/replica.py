"""A replica of the platform without its web service: only what it does in the background, in a process that may be killed.

python -m tests.cloud.replica NAME          the database's URL comes on standard input, then end of file means: stop
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Engine, event

from spvtpm.cloud.database import Database
from spvtpm.cloud.duties import Duties

ROOT = Path(__file__).parent.parent.parent


class ReplicaProcess:
    """A replica; stops in order at the end of a `with`.

    Args:
        url: of the database.
        name: among the replicas.
        log_path: what it logs goes there.
        patience_s: how long a step tries to reach a host.
        die_at: by its own SIGKILL at this statement or commit of the operations that it runs, counted from 1; 0: not.

    Attributes:
        process: its process.
        log_path: what it logs.
    """

    def __init__(self, url: str, name: str, log_path: Path, *, patience_s: float = 60.0, die_at: int = 0) -> None:
        self.log_path = log_path
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.cloud.replica", name, str(patience_s), str(die_at)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(url.encode() + b"\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"up\n", log_path.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def await_death(self) -> None:
        """Waits until it has killed itself."""
        assert self.process.wait(60) == -signal.SIGKILL, self.log_path.read_text()
        self._close()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self._close()

    def stop(self) -> None:
        """In order; a dead one stays dead."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.close()
            assert self.process.wait(60) == 0, self.log_path.read_text()
        self._close()

    def _close(self) -> None:
        self.process.wait(60)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def die_at(engine: Engine, number: int) -> None:
    """Ends this process in the middle of what its operations do with the database."""
    left = number

    def count(*_: Any) -> None:
        nonlocal left
        if threading.current_thread().name.startswith("dbos-executor"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    event.listen(engine, "before_cursor_execute", count)
    event.listen(engine, "commit", count)


def main() -> None:
    """See above."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")
    database = Database(sys.stdin.readline().strip())
    duties = Duties(database.engine, replica=sys.argv[1], patience_s=float(sys.argv[2]), look_every_s=0.5)
    die_at(database.engine, int(sys.argv[3]))
    duties.start()
    sys.stdout.write("up\n")
    sys.stdout.flush()
    sys.stdin.read()
    duties.close()
    database.close()


if __name__ == "__main__":
    main()
