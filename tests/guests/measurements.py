"""What a guest has measured of its boot: two logs and PCRs, as the guest says them; and the PCRs that the logs lead to."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from hashlib import sha1, sha256
from pathlib import Path
from typing import NamedTuple, Self

from tests.guests.machine import Guest

# The kernel says nothing more on the console, and IMA measures each program before it runs. That has to be over for all programs
# here before the log is read, and what is measured twice is one entry: busybox is one file.
SAY = """
dmesg -n 1
echo 'measure func=BPRM_CHECK' > /sys/kernel/security/ima/policy
printf '#!/bin/sh\\n:\\n' > /tmp/measured && chmod +x /tmp/measured && /tmp/measured
echo "boot=$(cat /proc/sys/kernel/random/boot_id);"
for n in 0 1 2 3 4 5 6 7 8 9 10; do echo "pcr$n=$(cat /sys/class/tpm/tpm0/pcr-sha256/$n);"; done
echo "ima=$(cat /sys/kernel/security/ima/ascii_runtime_measurements);"
echo "events=$(base64 -w 0 /sys/kernel/security/tpm0/binary_bios_measurements);"
"""
"""What a guest's shell runs to say them; at the end of that it has said `events=…;`."""

TRANSMIT = r"""
exec 3<>/dev/tpmrm0
while read -r command && [ "$command" != again ]; do
    printf "$command" >&3
    echo "answer=$(dd bs=4096 count=1 <&3 2>/dev/null | base64 -w 0);"
done
"""
"""What it runs to give the kernel's resource manager commands that are entered, over one connection, and to say the answers."""

EVENTS = r"\bevents=([A-Za-z0-9+/=]*);"

SCRIPT = b"#!/bin/sh\n:\n"
"""What /tmp/measured has in it."""


class Measured(NamedTuple):
    """What a guest has said, in one boot.

    Attributes:
        boot: the kernel's name of this boot.
        pcrs: the SHA-256 bank, from 0 to 10.
        events: the firmware's log, with what the kernel's EFI stub added.
        ima: lines of IMA's log.
    """

    boot: str
    pcrs: list[bytes]
    events: bytes
    ima: list[str]

    @classmethod
    def of(cls, said: str) -> Self:
        """Reads it from what the guest says."""
        values = dict(re.findall(r"\b(boot|pcr\d+|ima|events)=([^;]*);", said))
        return cls(
            values["boot"],
            [bytes.fromhex(values[f"pcr{n}"]) for n in range(11)],
            base64.b64decode(values["events"]),
            values["ima"].splitlines(),
        )

    def replayed(self, scratch: Path) -> dict[int, bytes]:
        """The PCRs that the firmware's log leads to, as tpm2_eventlog reckons.

        Args:
            scratch: a file that may be written.
        """
        return {
            int(number): bytes.fromhex(value)
            for number, value in re.findall(r"^    (\d+) +: 0x([0-9a-f]{64})$", self.explained(scratch), re.MULTILINE)
        }

    def explained(self, scratch: Path) -> str:
        """The firmware's log, as tpm2_eventlog explains it."""
        scratch.write_bytes(self.events)
        command = ["tpm2_eventlog", str(scratch)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def replayed_ima(self) -> bytes:
        """PCR 10, as IMA's log leads to it."""
        pcr = bytes(32)
        for line in self.ima:
            pcr = sha256(pcr + sha256(_template_data(line)).digest()).digest()
        return pcr

    def programs(self) -> dict[str, str]:
        """SHA-256 of each file that IMA has measured, by its path."""
        fields = [line.split(" ") for line in self.ima]
        return {name: digest.removeprefix("sha256:") for _pcr, _hash, _template, digest, name, *_ in fields}


def transmit(guest: Guest, command: bytes) -> bytes:
    """One command to the vTPM of a guest that runs `TRANSMIT`; its answer."""
    guest.said = ""
    guest.enter("".join(f"\\{byte:03o}" for byte in command))
    return base64.b64decode(guest.wait_for(r"\banswer=([A-Za-z0-9+/=]*);")[1])


def _template_data(line: str) -> bytes:
    """What IMA hashes of an entry, for each bank with the bank's algorithm.

    Source: Linux, Documentation/security/IMA-templates.rst, "ima-sig"; security/integrity/ima/ima_template_lib.c: each field
    follows its length; the algorithm and the name end with a zero byte.
    """
    pcr, template_hash, template, digest, name, signature = line.split(" ")
    assert (pcr, template, signature) == ("10", "ima-sig", "")
    algorithm, _, value = digest.partition(":")
    fields = f"{algorithm}:".encode() + b"\0" + bytes.fromhex(value), os.fsencode(name) + b"\0", b""
    data = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
    assert sha1(data).hexdigest() == template_hash, "the log's own column"  # noqa: S324  # IMA's
    return data
