"""What a guest says on its serial console, in files of bounded size: `serial`, and `serial.old` before it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1 << 20
"""Of each of the two files: a guest can say as much as it likes."""


_UNPRINTABLE: Final = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")
"""Whoever shows the file on a terminal does not want it controlled by a guest."""


class SerialLog:
    """One VM's.

    Args:
        path: of the newer file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, said: str) -> None:
        """Appends what has been said.

        Raises:
            OSError: it cannot be written.
        """
        if not said:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_UNPRINTABLE.sub("", said))
            is_full = file.tell() > MAX_BYTES
        if is_full:
            self._path.rename(self._path.with_name(f"{self._path.name}.old"))
