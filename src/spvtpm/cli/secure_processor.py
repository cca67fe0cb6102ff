"""`spvtpm sp`: make and run a secure processor."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from spvtpm.cli.parts import Json, Sp, call_sp, print_json
from spvtpm.wire import messages

sp_app = App(name="sp", help="The secure processor (SP): one daemon per host.")


@sp_app.command
def init(state: Path, /, *, chip: Path) -> None:
    """Make a new secure processor in an empty directory: fuses, configuration, NV store.

    Example: spvtpm sp init /var/lib/spvtpm --chip chip-1

    Parameters
    ----------
    state
        State directory; made with mode 0700 if it is missing.
    chip
        Chip file from `spvtpm vendor manufacture`. It is moved: a chip can be in one place only.
    """
    from spvtpm.processor.daemon import initialise

    fuses = initialise(state, chip)
    print(f"secure processor {fuses.chip_id.hex()} made in {state}; run it with: spvtpm sp run {state}")


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
