"""Makes what is not there yet: vendor, chips, secure processors, agents, the platform, a user. A death in between is no harm.

Agents and the platform are made by the commands that an administrator types.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.files import read_file, replace_file
from spvtpm.processor.config import DEFAULT_TOML
from spvtpm.processor.daemon import initialise
from spvtpm.stack.places import USER, Host, Places
from spvtpm.terminal.keyring import Keyring
from spvtpm.vendor.authority import init_vendor, read_revocation_list, refresh_revocation_list
from spvtpm.vendor.factory import manufacture_chip
from spvtpm.wire.platform_errors import PartFailed

LOOPBACK: Final = "127.0.0.1"
VENDOR_NAME: Final = "Example Silicon"

_MAX_PEM_BYTES: Final = 4096
_MAX_CONFIG_BYTES: Final = 65_536
_RENEW_LIST_BEFORE: Final = timedelta(days=15)
"""Half of a revocation list's life: `spvtpm up` may run for a while."""

Tell = Callable[[str], None]


def make_vendor(places: Places, tell: Tell) -> None:
    """The vendor, with a revocation list that is current for a while."""
    if not places.vendor.exists():
        init_vendor(places.vendor, VENDOR_NAME)
        tell(f"made the vendor {VENDOR_NAME}, and a fleet of its chips")
    elif read_revocation_list(places.vendor).next_update - datetime.now(UTC) < _RENEW_LIST_BEFORE:
        refresh_revocation_list(places.vendor)
        tell("the vendor's revocation list was about to end, and is issued anew")


def make_secure_processor(places: Places, host: Host, tell: Tell) -> None:
    """A secure processor with a chip of the vendor's."""
    chip = places.directory / f"{host.sp.name}.chip"
    if chip.exists() and host.sp.exists():
        shutil.rmtree(host.sp)  # the chip's file goes last: this one was not whole, and has never run
    if not host.sp.exists():
        if not chip.exists():
            manufacture_chip(places.vendor, chip)
        fuses = initialise(host.sp, chip)
        tell(f"made the secure processor of {host.name}, with chip {fuses.chip_id.hex()}")
    configuration = host.sp / "sp.toml"
    if configuration.read_text() == DEFAULT_TOML:  # or somebody has decided otherwise
        replace_file(configuration, f"admission_required = true\n{DEFAULT_TOML}".encode())


def make_agent(host: Host, tell: Tell) -> None:
    """The host's agent, for VMs on its secure processor."""
    if not (host.agent / "agent.toml").exists():
        (host.agent / "token").unlink(missing_ok=True)  # its configuration goes last: this one has never run
        _administrator("agent", "init", host.agent, "--sp", host.sp)
        tell(f"made the agent of {host.name}")


def make_platform(places: Places, port: int, tell: Tell) -> None:
    """The platform, which knows the hosts, and its first user.

    Args:
        places: of the stack.
        port: where it shall listen this time.
        tell: told what is made.
    """
    if not (places.cloud / "cloud.toml").exists():
        places.admin_token.unlink(missing_ok=True)
        _administrator("cloud", "init", places.cloud, "--output", places.admin_token)
        tell(f"made the platform, on SQLite, with an administrator's token in {places.admin_token}")
    _listen(places.cloud / "cloud.toml", port)
    for host in places.hosts:
        address = f"unix:{host.agent / 'agent.sock'}"
        _administrator("cloud", "add-host", places.cloud, host.name, address, "--token-file", host.agent / "token")
    if not places.token.exists():
        _administrator("cloud", "add-user", places.cloud, USER)
        _administrator("cloud", "new-token", places.cloud, USER, "--scope", "vms", "--output", places.token)
        tell(f"made the user {USER}, with a token in {places.token}")


def _listen(configuration: Path, port: int) -> None:
    """Says in the configuration where to listen; all else in it stays."""
    lines = read_file(configuration, _MAX_CONFIG_BYTES).decode().splitlines()
    others = [line for line in lines if line.partition("=")[0].strip() != "listen"]
    wanted = [f'listen = "{LOOPBACK}:{port}"   # written by spvtpm up', *others]  # first: before any table
    if wanted != lines:
        replace_file(configuration, "\n".join([*wanted, ""]).encode())


def make_keyring(places: Places, tell: Tell) -> None:
    """The first user's keyring, without a passphrase; it trusts the vendor, and knows the vendor's newest list."""
    if not (places.keyring / "keyring").exists():
        Keyring.create(places.keyring)
        tell(f"made a keyring for its first user, in {places.keyring}")
    keyring = Keyring.open(places.keyring, lambda: b"")
    root = x509.load_pem_x509_certificate(read_file(places.vendor / "root.pem", _MAX_PEM_BYTES, private=False))
    keyring.trust_root(root.public_bytes(Encoding.DER))
    keyring.put_revocation_list(read_revocation_list(places.vendor).crl.public_bytes(Encoding.DER))


def log_in(places: Places, url: str) -> None:
    """The keyring knows the platform, wherever it listens this time."""
    _administrator("login", url, "--token-file", places.token, "--keyring", places.keyring)


def _administrator(*words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spvtpm.cli", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        command = " ".join(map(str, words))
        raise PartFailed(f"spvtpm {command}: {done.stderr.strip() or f'exit code {done.returncode}'}")
