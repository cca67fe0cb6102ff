"""`spvtpm vendor`: the vendor's desk, offline. It makes chips, and certifies and revokes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from spvtpm.cli.parts import Json, print_json
from spvtpm.wire.errors import UsageError

vendor_app = App(name="vendor", help="The vendor's desk, offline: make chips, certify and revoke them.")

Directory = Annotated[Path, Parameter(help="The vendor's directory, made by `spvtpm vendor init`.")]


@vendor_app.command
def init(directory: Directory, /, *, name: str) -> None:
    """Make a vendor: root and intermediate authority, an empty revocation list, and a fleet of generation 1.

    Example: spvtpm vendor init vendor --name "Example Silicon"

    Parameters
    ----------
    name
        The vendor's name in its certificates, 1 to 40 characters.
    """
    from spvtpm.vendor.authority import init_vendor

    init_vendor(directory, name)
    print(f"vendor {name} made in {directory}; the root that others must trust is {directory / 'root.pem'}")


@vendor_app.command
def manufacture(directory: Directory, output: Path, /, *, json: Json = False) -> None:
    """Make a chip: its endorsement key, its certificate, and the fleet's secret, in one private file.

    Example: spvtpm vendor manufacture vendor chip-1

    Parameters
    ----------
    output
        The chip file, mode 0600; it must not exist.
    """
    from spvtpm.vendor.factory import manufacture_chip

    chip = manufacture_chip(directory, output).chip
    if json:
        print_json({"chip_id": chip.chip_id.hex(), "fleet_id": chip.fleet_id.hex(), "model": chip.model})
    else:
        print(f"chip {chip.chip_id.hex()} of fleet {chip.fleet_id.hex()} made: {output}")


@vendor_app.command
def revoke(directory: Directory, chip: str, /) -> None:
    """Revoke a chip, for good; whoever has the new list refuses it.

    Example: spvtpm vendor revoke vendor 3f0c52ce34d54b6c8d8f6c0f3f0e9a11

    Parameters
    ----------
    chip
        The chip's id, 32 hexadecimal digits.
    """
    from spvtpm.vendor.authority import revoke_chip

    try:
        chip_id = bytes.fromhex(chip)
    except ValueError:
        raise UsageError(f"{chip} is no chip id: 32 hexadecimal digits") from None
    listed = revoke_chip(directory, chip_id)
    print(f"chip {chip} revoked; revocation list {listed.number} is current until {listed.next_update:%Y-%m-%d}")


@vendor_app.command
def refresh_list(directory: Directory, /) -> None:
    """Issue the revocation list anew before it ends, 30 days after the last time.

    Example: spvtpm vendor refresh-list vendor
    """
    from spvtpm.vendor.authority import refresh_revocation_list

    listed = refresh_revocation_list(directory)
    print(f"revocation list {listed.number} is current until {listed.next_update:%Y-%m-%d}")


@vendor_app.command
def raise_generation(directory: Directory, /) -> None:
    """Begin the fleet's next generation: chips made from now on can open older files, and older chips not theirs.

    Example: spvtpm vendor raise-generation vendor
    """
    from spvtpm.vendor import authority

    print(f"generation {authority.raise_generation(directory)}")
