"""The platform's configuration: one TOML file, one frozen struct. It may have the database's password, so it is private."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from spvtpm.files import read_file
from spvtpm.wire.decoding import UNDECODABLE, in_words
from spvtpm.wire.errors import ConfigError, StorageError

CONFIG_FILE: Final = "cloud.toml"
DATABASE_FILE: Final = "platform.sqlite"

_MAX_CONFIG_BYTES: Final = 65_536
_TCP: Final = re.compile(r"\A(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})\Z")

Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of something there may be at a time. Counts but that of VMs are of one replica.

    Attributes:
        vms_per_user: VMs of one user.
        streams_per_user: event streams of one user.
        relays_per_user: relayed channels and consoles of one user.
        relays_per_host: of one host.
        relays: in all.
        relay_idle_s: one that carries nothing for this long is ended.
        patience_s: a client that does not send its request, or does not take its answer, is left after this time.
    """

    vms_per_user: Count = 1000
    streams_per_user: Count = 16
    relays_per_user: Count = 16
    relays_per_host: Count = 48
    relays: Count = 512
    relay_idle_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 300.0
    patience_s: Annotated[float, Meta(ge=0.1, le=3600)] = 20.0


class CloudConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`cloud.toml`; every key may be left out.

    Attributes:
        database_url: as SQLAlchemy has it: `sqlite:////path` or `postgresql+psycopg://…`; if left out, SQLite in the
            file `platform.sqlite` beside this one.
        database_url_variable: the environment variable that has it instead.
        listen: `HOST:PORT`, or `unix:/path`; port 0 is any free one.
        limits: how much of something there may be.
    """

    database_url: Annotated[str, Meta(max_length=1024)] | None = None
    database_url_variable: Annotated[str, Meta(pattern=r"\A[A-Za-z_][A-Za-z0-9_]{0,127}\Z")] | None = None
    listen: Annotated[str, Meta(max_length=300)] = "127.0.0.1:7580"
    limits: Limits = Limits()  # frozen

    def __repr__(self) -> str:
        return f"CloudConfig(listen={self.listen!r})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("listen", self.listen)]


DEFAULT_TOML: Final = """\
# Configuration of this cloud platform. Every key may be left out.
# database_url = "postgresql+psycopg://spvtpm@db.example/spvtpm"   # default: SQLite, in platform.sqlite beside this file
# database_url_variable = "SPVTPM_DATABASE_URL"   # the environment variable that has the URL instead
# listen = "127.0.0.1:7580"   # or unix:/run/spvtpm/cloud.sock

[limits]
# vms_per_user = 1000
# streams_per_user = 16    # event streams at a time, in one replica
# relays_per_user = 16     # relayed channels and consoles at a time, in one replica
# relays_per_host = 48
# relays = 512
# relay_idle_s = 300.0     # one that carries nothing for this long is ended
# patience_s = 20.0        # for a client that does not send its request, or does not take its answer
"""


def load_config(directory: Path) -> CloudConfig:
    """Reads `cloud.toml` in the platform's directory.

    Raises:
        ConfigError: it cannot be read, others can read it, or a key is unknown or out of bounds.
    """
    path = directory / CONFIG_FILE
    try:
        return msgspec.toml.decode(read_file(path, _MAX_CONFIG_BYTES), type=CloudConfig)
    except StorageError as error:
        raise ConfigError(str(error)) from None
    except (*UNDECODABLE, ValueError) as error:
        raise ConfigError(f"{path}: {in_words(error)}") from None


def database_url(config: CloudConfig, directory: Path) -> str:
    """Where the database is; a secret, since it may contain a password.

    Raises:
        ConfigError: the configuration says it twice, or the environment variable is not set.
    """
    if config.database_url is not None and config.database_url_variable is not None:
        raise ConfigError(f"{directory / CONFIG_FILE} has both database_url and database_url_variable")
    if config.database_url is not None:
        return config.database_url
    if config.database_url_variable is None:
        return f"sqlite:///{(directory / DATABASE_FILE).absolute()}"
    url = os.environ.get(config.database_url_variable)
    if not url:
        raise ConfigError(f"the environment variable {config.database_url_variable} is not set")
    return url


def parse_listen(listen: str) -> Path | tuple[str, int]:
    """Where to listen: a unix socket, or host and port.

    Raises:
        ConfigError: it says neither.
    """
    if listen.startswith("unix:/"):
        path = Path(listen.removeprefix("unix:"))
        if len(os.fsencode(path)) > 107:  # sockaddr_un.sun_path, unix(7)
            raise ConfigError(f"{path} is too long for a unix socket")
        return path
    match = _TCP.match(listen)
    if match is None or int(match[3]) > 65_535:
        raise ConfigError(f"listen is {in_words(ValueError(listen))}, which is neither HOST:PORT nor unix:/path")
    return match[1] or match[2], int(match[3])
