"""The unit files for a real host: systemd accepts them, and they run commands that exist, as users that exist."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spvtpm.guest.same_boot import RECORD

FILES = Path(__file__).parent.parent.parent / "deploy" / "systemd"
UNITS = sorted(FILES.glob("*.service"))
GUEST_UNIT = FILES.parent / "guest" / "spvtpm-guest.service"
PROGRAM = "/opt/spvtpm/bin/spvtpm"


def name(path: Path) -> str:
    return path.name


def read(unit: Path) -> configparser.SectionProxy:
    """The section `Service`; of a key that is there twice, the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return parser["Service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", [*UNITS, GUEST_UNIT], ids=name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    here = str(Path(sys.executable).with_name("spvtpm"))
    for other in [*UNITS, GUEST_UNIT]:  # a unit may name others
        (tmp_path / other.name).write_text(other.read_text().replace(PROGRAM, here))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit.name)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", [*UNITS, GUEST_UNIT], ids=name)
def test_the_unit_runs_a_command_that_there_is(unit: Path) -> None:
    words = read(unit)["ExecStart"].split()
    assert words[0] == PROGRAM
    done = subprocess.run(
        [sys.executable, "-m", "spvtpm.cli", *words[1:3], "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert re.search(rf"spvtpm {words[1]} {words[2]}\b", done.stdout)


@pytest.mark.parametrize("unit", UNITS, ids=name)
def test_the_unit_runs_as_a_user_that_sysusers_makes_and_in_its_own_directory(unit: Path) -> None:
    service = read(unit)
    made = dict(re.findall(r'(?m)^u (\S+) +- "[^"]+" (\S+)$', (FILES / "spvtpm.conf").read_text()))
    directory = f"/var/lib/{service['StateDirectory']}"
    assert made[service["User"]] == directory
    assert service["ExecStart"].split()[-1] == directory


@pytest.mark.parametrize("unit", UNITS, ids=name)
def test_the_unit_gives_no_privilege(unit: Path) -> None:
    service = read(unit)
    assert service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert service["ProtectSystem"] == "strict"
    assert service["LimitCORE"] == "0"
    assert service["UMask"] == "0077"


def test_vms_outlive_an_agent_that_dies_and_a_secure_processor_may_lock_its_memory() -> None:
    services = {unit.stem: read(unit) for unit in UNITS}
    assert services["spvtpm-agent"]["KillMode"] == "process"
    assert services["spvtpm-agent"]["Restart"] == "always"
    assert services["spvtpm-sp"]["LimitMEMLOCK"] == "infinity"


@pytest.mark.attack("A13")
def test_the_note_of_the_tpms_start_outlives_the_guests_service() -> None:
    service = read(GUEST_UNIT)
    assert RECORD.parent == Path("/run") / service["RuntimeDirectory"]
    assert service["RuntimeDirectoryPreserve"] == "yes"
