"""Makes what is not there yet: vendor, chips, secure processors, agents, the platform, a user. A death in between is no harm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.cloud import auth
from spvtpm.cloud.config import CONFIG_FILE
from spvtpm.cloud.founding import found_platform
from spvtpm.cloud.host_addresses import set_host
from spvtpm.cloud.migrations import migrate
from spvtpm.cloud.service import open_database
from spvtpm.files import create_file, read_file, replace_file
from spvtpm.hypervisor import agent
from spvtpm.hypervisor.config import AgentConfig, read_token
from spvtpm.processor.config import DEFAULT_TOML
from spvtpm.processor.daemon import initialise
from spvtpm.stack.places import USER, Host, Places
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.owned import Account
from spvtpm.vendor.authority import REVOCATION_LIST_FILE, init_vendor, read_revocation_list, refresh_revocation_list
from spvtpm.vendor.factory import manufacture_chip
from spvtpm.wire.platform_api import HostAddress, NewToken

LOOPBACK: Final = "127.0.0.1"
VENDOR_NAME: Final = "Example Silicon"

_MAX_PEM_BYTES: Final = 4096
_MAX_CONFIG_BYTES: Final = 65_536
_MAX_TOKEN_BYTES: Final = 256
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


def make_agent(places: Places, host: Host, tell: Tell) -> None:
    """The host's agent, for VMs on its secure processor, and for those that move."""
    if (host.agent / "agent.toml").exists():
        return
    (host.agent / "token").unlink(missing_ok=True)  # its configuration goes last: this one has never run
    revoked = places.vendor / REVOCATION_LIST_FILE
    agent.initialise(host.agent, AgentConfig(sp=str(host.sp), revocation_list=str(revoked)))
    tell(f"made the agent of {host.name}")


def make_platform(places: Places, port: int, tell: Tell) -> None:
    """The platform, with tables of this release, which knows the hosts, and its first user.

    Args:
        places: of the stack.
        port: where it shall listen this time.
        tell: told what is made.
    """
    if not (places.cloud / CONFIG_FILE).exists():
        made = found_platform(places.cloud)
        replace_file(places.admin_token, f"{made.secret}\n".encode())
        tell(f"made the platform, on SQLite, with an administrator's token in {places.admin_token}")
    _listen(places.cloud / CONFIG_FILE, port)
    database = open_database(places.cloud)
    try:
        migrate(database)
        with database.write() as connection:
            for host in places.hosts:
                token = read_token(host.agent / "token")
                set_host(connection, host.name, HostAddress(address=agent.address_of(host.agent), token=token))
            if places.token.exists():
                return
            auth.add_user(connection, USER)
            made = auth.make_token(connection, USER, NewToken(scopes=["vms"], note="made by spvtpm up"))
        create_file(places.token, f"{made.secret}\n".encode())
        tell(f"made the user {USER}, with a token in {places.token}")
    finally:
        database.close()


def _listen(configuration: Path, port: int) -> None:
    """Says in the configuration where to listen; all else in it stays."""
    lines = read_file(configuration, _MAX_CONFIG_BYTES).decode().splitlines()
    others = [line for line in lines if line.partition("=")[0].strip() != "listen"]
    wanted = [f'listen = "{LOOPBACK}:{port}"   # written by spvtpm up', *others]  # first: before any table
    if wanted != lines:
        replace_file(configuration, "\n".join([*wanted, ""]).encode())


def make_keyring(places: Places, url: str, tell: Tell) -> Account:
    """The first user's keyring, without a passphrase; it trusts the vendor, knows the vendor's newest list, and the platform.

    Args:
        places: of the stack.
        url: of the platform, this time.
        tell: told what is made.
    """
    if not (places.keyring / "keyring").exists():
        Keyring.create(places.keyring)
        tell(f"made a keyring for its first user, in {places.keyring}")
    keyring = Keyring.open(places.keyring, lambda: b"")
    root = x509.load_pem_x509_certificate(read_file(places.vendor / "root.pem", _MAX_PEM_BYTES, private=False))
    keyring.trust_root(root.public_bytes(Encoding.DER))
    keyring.put_revocation_list(read_revocation_list(places.vendor).crl.public_bytes(Encoding.DER))

    account = Account(url=url, token=read_file(places.token, _MAX_TOKEN_BYTES).decode().strip())
    keyring.use_platform(account)
    return account
