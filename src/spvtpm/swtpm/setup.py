"""The command `spvtpm-swtpm-setup`: makes a TPM for `spvtpm-swtpm`, as libvirt has swtpm_setup do it.

Source: swtpm_setup(8); the handles of endorsement keys: TCG EK Credential Profile 2.5, section 2.2.1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import struct
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from spvtpm.files.state_lock import lock_state
from spvtpm.processor.worker import tpm_commands
from spvtpm.swtpm.options import Parser
from spvtpm.swtpm.power import powering
from spvtpm.swtpm.sockets import DataServer
from spvtpm.wire.ek_templates import ECC_P384, RSA_2048, EkTemplate
from spvtpm.wire.errors import AlreadyExists, SpvtpmError, StorageError, UsageError, WorkerError

log = logging.getLogger(__name__)

_PERSISTENT: dict[EkTemplate, int] = {RSA_2048: 0x81010001, ECC_P384: 0x81010016}
"""Where swtpm_setup keeps the endorsement keys that it makes."""

_CERTIFICATES = ("create_ek_cert", "create_platform_cert")
_CAPABILITIES = ("tpm-2.0", "tpm12-not-need-root", "tpm2-rsa-keysize-2048")
_STATE_FILES = ("nv.db", "root-key")


def main() -> None:
    """Runs the command line; ends the process with 0, or with 1 and a sentence on stderr, as swtpm_setup does."""
    if "--print-capabilities" in sys.argv:
        print(json.dumps({"type": "swtpm_setup", "features": _CAPABILITIES, "version": version("spvtpm")}))
        return
    try:
        _carry_out(_read(sys.argv[1:]))
    except SpvtpmError as error:
        print(f"spvtpm-swtpm-setup: {error}", file=sys.stderr)
        sys.exit(1)


def _read(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="spvtpm-swtpm-setup", description="Makes a TPM for spvtpm-swtpm.", allow_abbrev=False)
    parser.add_argument("--tpm2", action="store_true", help="a TPM 2.0; there is no other")
    parser.add_argument("--tpm-state", "--tpmstate", required=True, metavar="DIR", help="directory of its state")
    parser.add_argument("--createek", action="store_true", help="have endorsement keys at their persistent handles")
    for name in _CERTIFICATES:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, action="store_true", help="as --createek: nobody is here who could certify")
    parser.add_argument("--lock-nvram", action="store_true", help="nothing: without certificates NV is empty")
    parser.add_argument("--vmid", help="nothing: it would name the VM in a certificate")
    parser.add_argument("--overwrite", action="store_true", help="a TPM that is there already goes")
    parser.add_argument("--not-overwrite", action="store_true", help="if there is one already, do nothing")
    parser.add_argument("--logfile", type=Path, help="where the log goes")
    told = parser.parse_args(words)
    if not told.tpm2:
        raise UsageError("only TPM 2.0: --tpm2 is missing")
    return told


def _carry_out(told: argparse.Namespace) -> None:
    try:
        logging.basicConfig(filename=told.logfile, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    except OSError as error:
        raise StorageError(f"the log cannot be written: {error.strerror}") from None
    state = Path(told.tpm_state.removeprefix("dir://"))
    if any((state / name).exists() for name in _STATE_FILES):
        if told.not_overwrite:
            return
        if not told.overwrite:
            raise AlreadyExists(f"{state} has a TPM in it; --overwrite makes another, --not-overwrite keeps it")
        _remove(state)
    wants_certificates = any(getattr(told, name) for name in _CERTIFICATES)
    asyncio.run(_make(state, _PERSISTENT if told.createek or wants_certificates else {}))
    if wants_certificates:
        log.warning("the TPM has no certificates: there is no chip here that could vouch for it")


def _remove(state: Path) -> None:
    os.close(lock_state(state))  # nobody uses it
    for name in (*_STATE_FILES, "nv.db-wal", "nv.db-shm"):
        (state / name).unlink(missing_ok=True)


async def _make(state: Path, keys: dict[EkTemplate, int]) -> None:
    async with powering(state) as power:
        data = DataServer(power.emulation, lambda: None)
        await power.switch_on()
        await _do(data, tpm_commands.STARTUP_CLEAR)
        for template, persistent in keys.items():
            made = await _do(data, tpm_commands.create_primary_ek(template.public))
            handle, _public = tpm_commands.created_primary(made)
            await _do(data, _evict_control(handle, persistent))
        data.close()


async def _do(data: DataServer, command: bytes) -> bytes:
    response = await data.transmit(command)
    if code := tpm_commands.response_code(response):
        raise WorkerError(f"a new TPM refuses a command of its maker: TPM result {code:#x}")
    return response


def _evict_control(handle: int, persistent: int) -> bytes:
    """TPM2_EvictControl by the owner, whose password is empty. Source: TCG TPM 2.0 Library Part 3."""
    session = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
    return struct.pack(">HIIII", 0x8002, 35, 0x120, 0x40000001, handle) + session + struct.pack(">I", persistent)


if __name__ == "__main__":
    main()
