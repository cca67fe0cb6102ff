"""`spvtpm login`, `logout`, `chips`, `completion`: the way to a cloud platform, and what it has."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from spvtpm.cli.parts import Json, print_json
from spvtpm.cli.platform_parts import at_platform, extra_needed
from spvtpm.cli.terminal_parts import Own, as_dict
from spvtpm.wire.errors import StorageError, UsageError

_NO_KEYRING = Own()
_MAX_TOKEN_BYTES = 256


def login(
    url: str,
    /,
    *,
    token_file: Path | None = None,
    ca_file: Path | None = None,
    plain_http: Annotated[bool, Parameter(negative="")] = False,
    own: Own = _NO_KEYRING,
    json: Json = False,
) -> None:
    """Use a cloud platform from now on; it is asked whether it knows your token.

    Example: spvtpm login https://cloud.example --token-file token

    The platform is trusted with nothing but running your VMs: your keyring verifies each chip itself. If you have no keyring yet,
    `spvtpm terminal init` makes one.

    Parameters
    ----------
    url
        https://HOST[:PORT], http://localhost[:PORT] or unix:/PATH.
    token_file
        A private file with the token that the platform's administrator gave you; otherwise it is asked for.
    ca_file
        The authorities that may vouch for the platform's certificate, PEM, if they are not those of this machine.
    plain_http
        Speak http with another machine: whoever is on the way can use your token. For a network that is yours alone.
    """
    with extra_needed():
        from spvtpm.terminal.platform import Platform
    import msgspec

    from spvtpm.terminal.owned import Account

    keyring = own.open()
    told = {
        "url": url,
        "token": _token(token_file),
        "ca_file": "" if ca_file is None else str(ca_file.absolute()),
        "plain_http": plain_http,
    }
    try:
        account = msgspec.convert(told, Account)
    except msgspec.ValidationError:  # which could quote the token
        raise UsageError("no token of a platform: it is one word, of at most 256 characters") from None
    with Platform(account, patience_s=0) as platform:
        me = platform.me()
    keyring.use_platform(account)
    if json:
        print_json({"url": url, "name": me.name, "scopes": me.scopes})
    else:
        print(f"logged in at {url} as {me.name}, who may: {', '.join(me.scopes)}")


def logout(*, own: Own = _NO_KEYRING) -> None:
    """Forget the platform and your token; your VMs and their keys stay in the keyring.

    Example: spvtpm logout --keyring keyring
    """
    own.open().use_platform(None)
    print("logged out; ask the platform's administrator to withdraw the token if nobody shall use it any more")


def chips(*, own: Own = _NO_KEYRING, json: Json = False) -> None:
    """The platform's chips: what each has shown through the platform's relay, verified here, and what the platform says of it.

    Example: spvtpm chips --json
    """
    from spvtpm.wire.decoding import printable

    with at_platform(own, json=True) as site:
        from dataclasses import replace

        from spvtpm.terminal.overview import survey

        found = survey(replace(site, tell_verified=lambda _verified: None))
    if json:
        print_json(
            [
                {
                    "chip_id": chip.says.chip_id,
                    "verified": None if chip.verified is None else as_dict(chip.verified),
                    "refusal": None
                    if chip.refusal is None
                    else {"error": chip.refusal.code, "message": str(chip.refusal)},
                    "platform_says": {
                        "host": chip.says.host,
                        "is_online": chip.says.is_online,
                        "firmware": chip.says.firmware,
                        "software": chip.says.software,
                        "vms": chip.says.vms,
                        "max_vms": chip.says.max_vms,
                    },
                }
                for chip in found
            ]
        )
        return
    for chip in found:
        print(
            f"verified: {chip.verified}" if chip.verified else f"not verified: chip {chip.says.chip_id}: {chip.refusal}"
        )
        says = chip.says
        online = "online" if says.is_online else "not online"
        print(
            f"  the platform says: host {says.host}, {online}, firmware {says.firmware}, spvtpm {printable(says.software)}, "
            f"{says.vms} of {says.max_vms} VMs"
        )


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print what makes a shell complete commands and options.

    Example: spvtpm completion bash > ~/.local/share/bash-completion/completions/spvtpm

    Parameters
    ----------
    shell
        Which shell.
    """
    from spvtpm.cli import app

    print(app.generate_completion(shell=shell))


def _token(path: Path | None) -> str:
    if path is not None:
        from spvtpm.files import read_file

        try:
            return read_file(path, _MAX_TOKEN_BYTES + 1).strip().decode("ascii")
        except UnicodeDecodeError:
            raise StorageError(f"{path} holds no token") from None
    if not Path("/dev/tty").exists() or not sys.stderr.isatty():
        raise UsageError("there is no terminal to ask for the token on: give --token-file FILE")
    return getpass.getpass("Token: ").strip()
