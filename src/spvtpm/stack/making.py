"""Makes what is not there yet: vendor, chips, secure processors, agents, the platform, a user. A death in between is no harm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from spvtpm.files import read_file
from spvtpm.processor.daemon import initialise
from spvtpm.stack.places import Host, Places
from spvtpm.terminal.keyring import Keyring
from spvtpm.vendor.authority import init_vendor, read_revocation_list, refresh_revocation_list
from spvtpm.vendor.factory import manufacture_chip

VENDOR_NAME: Final = "Example Silicon"

_MAX_PEM_BYTES: Final = 4096
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
    if host.sp.exists():
        return
    if not chip.exists():
        manufacture_chip(places.vendor, chip)
    fuses = initialise(host.sp, chip)
    tell(f"made the secure processor of {host.name}, with chip {fuses.chip_id.hex()}")


def make_keyring(places: Places, tell: Tell) -> Keyring:
    """The first user's keyring, without a passphrase; it trusts the vendor, and knows the vendor's newest list."""
    if not (places.keyring / "keyring").exists():
        Keyring.create(places.keyring)
        tell(f"made a keyring for its first user, in {places.keyring}")
    keyring = Keyring.open(places.keyring, lambda: b"")
    root = x509.load_pem_x509_certificate(read_file(places.vendor / "root.pem", _MAX_PEM_BYTES, private=False))
    keyring.trust_root(root.public_bytes(Encoding.DER))
    keyring.put_revocation_list(read_revocation_list(places.vendor).crl.public_bytes(Encoding.DER))
    return keyring
