"""Where everything of a stack lies, below one directory:

lock            held while any part of it runs
vendor/         the chips' vendor
sp-1/, sp-2/    the secure processor of each host
agent-1/, …     the hypervisor's agent of each host
cloud/          the platform, with its database
user/spvtpm/    the keyring of its first user: what a terminal finds with XDG_DATA_HOME=…/user
user/token      that user's token at the platform, private
log/            what each part says
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spvtpm.files.unix_sockets import MAX_SOCKET_PATH_BYTES
from spvtpm.wire.errors import StorageError

USER: Final = "you"
HOSTS: Final = 2

_LONGEST_BYTES: Final = MAX_SOCKET_PATH_BYTES - len(
    "/agent-1/vms/00000000-0000-0000-0000-000000000000/machine/control.sock"
)
"""Of a directory below which every socket's path fits."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host.

    Attributes:
        name: at the platform.
        sp: of its secure processor.
        agent: of its agent.
    """

    name: str
    sp: Path
    agent: Path


@dataclass(frozen=True, slots=True)
class Places:
    """Paths of one stack.

    Attributes:
        directory: all of it.
        short: the same directory under a name that leaves room for sockets' paths.
    """

    directory: Path
    short: Path

    @property
    def vendor(self) -> Path:
        return self.directory / "vendor"

    @property
    def cloud(self) -> Path:
        return self.directory / "cloud"

    @property
    def data_home(self) -> Path:
        """What the user's terminal has as XDG_DATA_HOME."""
        return self.directory / "user"

    @property
    def keyring(self) -> Path:
        return self.data_home / "spvtpm"

    @property
    def token(self) -> Path:
        return self.data_home / "token"

    @property
    def admin_token(self) -> Path:
        return self.directory / "admin-token"

    @property
    def hosts(self) -> tuple[Host, ...]:
        return tuple(
            Host(f"host-{number}", self.short / f"sp-{number}", self.short / f"agent-{number}")
            for number in range(1, HOSTS + 1)
        )

    def log(self, part: str) -> Path:
        return self.directory / "log" / f"{part}.log"


def make_places(directory: Path) -> Places:
    """The directory, made if it is missing, closed to others.

    Raises:
        StorageError: it cannot be made, or is somebody else's.
    """
    directory = directory.absolute()
    try:
        for path in (directory, directory / "log", directory / "user"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own(path)
        return Places(directory, _short_name(directory))
    except OSError as error:
        raise StorageError(f"cannot make {error.filename or directory}: {error.strerror}") from None


def is_data_home(path: Path) -> bool:
    """Whether this is what the user of some stack has as XDG_DATA_HOME."""
    return path.name == "user" and (path.parent / "lock").exists() and (path.parent / "vendor").is_dir()


def _short_name(directory: Path) -> Path:
    """A link to it, if its own name is too long; the same one each time: agents find their VMs' processes by it."""
    if len(os.fsencode(directory)) <= _LONGEST_BYTES and str(directory).isascii():
        return directory
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if not runtime.is_absolute() or len(os.fsencode(runtime)) + len("/spvtpm-01234567") > _LONGEST_BYTES:
        runtime = Path(tempfile.gettempdir()) / f"spvtpm-{os.geteuid()}"
        runtime.mkdir(mode=0o700, exist_ok=True)
    _check_own(runtime)
    link = runtime / f"spvtpm-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]}"
    if link.is_symlink() and link.readlink() != directory:
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(directory)
    return link


def _check_own(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StorageError(f"{path} is not this user's own directory, closed to the writing of others")
