"""`spvtpm sp`: make and run a secure processor."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from spvtpm.cli.parts import Json, Sp, call_sp, print_json
from spvtpm.wire import messages
from spvtpm.wire.errors import UsageError

sp_app = App(name="sp", help="The secure processor (SP): one daemon per host.")


@sp_app.command
def init(
    state: Path,
    /,
    *,
    chip: Path,
    seal_to_tpm: str | None = None,
    pcrs: str = "0,2,4,7",
    pkcs11_module: Path | None = None,
    token: str | None = None,
    pin_file: Path | None = None,
) -> None:
    """Make a new secure processor in an empty directory: fuses, configuration, NV store.

    Example: spvtpm sp init /var/lib/spvtpm --chip chip-1

    Parameters
    ----------
    state
        State directory; made with mode 0700 if it is missing.
    chip
        Chip file from `spvtpm vendor manufacture`. It is moved: a chip can be in one place only.
    seal_to_tpm
        Seal the chip to the host's own TPM 2.0, which has this TCTI: device:/dev/tpmrm0.
    pcrs
        With --seal-to-tpm: PCRs that must be as they are now, or the chip stays shut.
    pkcs11_module
        Move the chip into a token, which has this PKCS#11 library.
    token
        With --pkcs11-module: the token's label.
    pin_file
        With --pkcs11-module: a private file with the user's PIN.
    """
    from spvtpm.processor.daemon import initialise
    from spvtpm.processor.fuses.keepers import IN_DIRECTORY, HostTpm, Keeper, Pkcs11Token

    keeper: Keeper = IN_DIRECTORY
    if seal_to_tpm is not None:
        keeper = HostTpm(seal_to_tpm, _parse_pcrs(pcrs))
    token_options = (pkcs11_module, token, pin_file)
    if any(option is not None for option in token_options):
        if seal_to_tpm is not None or pkcs11_module is None or token is None or pin_file is None:
            raise UsageError("a token needs --pkcs11-module, --token and --pin-file, and no --seal-to-tpm")
        keeper = Pkcs11Token(str(pkcs11_module.absolute()), token, str(pin_file.absolute()))
    fuses = initialise(state, chip, keeper)
    print(f"secure processor {fuses.chip_id.hex()} made in {state}; run it with: spvtpm sp run {state}")


def _parse_pcrs(text: str) -> tuple[int, ...]:
    pcrs = {int(number) if number.isascii() and number.isdigit() else -1 for number in text.split(",")}
    if not pcrs <= set(range(24)):
        raise UsageError(f"{text} are no PCRs: numbers from 0 to 23 with commas")
    return tuple(sorted(pcrs))


@sp_app.command
def run(state: Path, /) -> None:
    """Run the secure processor in the foreground until SIGTERM or Ctrl-C. The log goes to stderr.

    Example: spvtpm sp run /var/lib/spvtpm

    Parameters
    ----------
    state
        State directory, made by `spvtpm sp init`.
    """
    import asyncio
    import logging

    from spvtpm.processor.daemon import SecureProcessor

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)

    async def serve() -> None:
        await SecureProcessor(state).run(lambda path: print(f"listening on {path}", flush=True))

    asyncio.run(serve())


@sp_app.command
def status(*, sp: Sp, json: Json = False) -> None:
    """Show how the secure processor is.

    Example: spvtpm sp status --sp /var/lib/spvtpm/run/sp.sock
    """
    reply = call_sp(sp, messages.GetStatus())
    assert isinstance(reply, messages.Status)  # noqa: S101  # the answer that belongs to the request
    if json:
        print_json(reply)
        return
    print(f"chip {reply.chip_id}, spvtpm {reply.software}")
    print(f"VMs {reply.vms}, vTPMs active {reply.active}, parked {reply.parked}")
    for sentence in reply.missing_protection:
        print(f"missing protection: {sentence}")
