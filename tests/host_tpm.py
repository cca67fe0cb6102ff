"""A real TPM 2.0 for the host, in a process of its own: swtpm."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from tpm2_pytss import (  # type: ignore[import-untyped]
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_SU,
    TPML_DIGEST_VALUES,
    TPML_PCR_SELECTION,
    TPMS_PCR_SELECTION,
    TPMT_HA,
    TPMU_HA,
)

from tests.harness import has_ended

_Change = Callable[[bytes], bytes]

needs_swtpm = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")

_NV_INDICES = 0x0100_0000  # Source: TPM 2.0 Library, Part 2, "TPM_HT": 0x01 is the type of NV indices


class HostTpm:
    """The host's TPM, powered on. What it keeps it has again after `reboot`, its PCRs at 0.

    Args:
        state: its directory; made if it is missing.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self.tcti = f"swtpm:path={state / 'tpm'}"
        state.mkdir(exist_ok=True)
        self._power_on()

    def _power_on(self) -> None:
        server, control = self.state / "tpm", self.state / "tpm.ctrl"
        subprocess.run(
            [
                *(
                    "swtpm",
                    "socket",
                    "--tpm2",
                    "--tpmstate",
                    f"dir={self.state}",
                    "--pid",
                    f"file={self.state / 'pid'}",
                ),
                *("--server", f"type=unixio,path={server}", "--ctrl", f"type=unixio,path={control}"),
                *("--flags", "not-need-init,startup-clear", "--daemon"),  # the command ends once the daemon listens
            ],
            check=True,
            timeout=60,
        )
        self._pid = int((self.state / "pid").read_text())

    def power_off(self) -> None:
        """Ends the process."""
        process = os.pidfd_open(self._pid)
        signal.pidfd_send_signal(process, signal.SIGTERM)
        assert has_ended(process)

    def reboot(self) -> None:
        """A new boot of the host."""
        self.power_off()
        self._power_on()

    def extend(self, pcr: int) -> None:
        """Something is measured into a PCR."""
        digest = TPML_DIGEST_VALUES([TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=b"m" * 32))])
        with ESAPI(self.tcti) as esapi:
            esapi.pcr_extend(ESYS_TR.PCR0 + pcr, digest)

    def drop_sha256_bank(self) -> None:
        """Its firmware keeps PCRs in SHA-1 alone, from the next boot on."""
        all_of, none_of = b"\xff\xff\xff", bytes(3)
        banks = [
            TPMS_PCR_SELECTION(hash=bank, sizeofSelect=3, pcrSelect=pcrs)
            for bank, pcrs in ((TPM2_ALG.SHA1, all_of), (TPM2_ALG.SHA256, none_of))
        ]
        with ESAPI(self.tcti) as esapi:
            esapi.pcr_allocate(TPML_PCR_SELECTION(banks))
            esapi.shutdown(TPM2_SU.CLEAR)
        self.reboot()

    def nv_indices(self) -> list[int]:
        """What is in its NV memory."""
        with ESAPI(self.tcti) as esapi:
            _more, found = esapi.get_capability(TPM2_CAP.HANDLES, _NV_INDICES, 100)
            return [int(handle) for handle in found.data.handles]

    def undefine(self, index: int) -> None:
        """Its owner takes an NV index away."""
        with ESAPI(self.tcti) as esapi:
            esapi.nv_undefine_space(esapi.tr_from_tpmpublic(index))

    def clear(self) -> None:
        """Its owner begins anew."""
        with ESAPI(self.tcti) as esapi:
            esapi.clear(ESYS_TR.LOCKOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.power_off()


class Bus:
    """The wires between the host and its TPM, in the hands of somebody who listens, and changes responses.

    Args:
        place: directory of its sockets, which stand for the TPM's.
        tpm: where the commands go.
    """

    def __init__(self, place: Path, tpm: HostTpm) -> None:
        self.tcti = f"swtpm:path={place / 'bus'}"
        self.heard = b""
        self.change: _Change = lambda response: response
        self._listeners = [
            self._listen(place / name, tpm.state / theirs)
            for name, theirs in (("bus", "tpm"), ("bus.ctrl", "tpm.ctrl"))
        ]

    def _listen(self, here: Path, there: Path) -> tuple[socket.socket, threading.Thread]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(here))
        listener.listen()
        server = threading.Thread(target=self._serve, args=(listener, there))
        server.start()
        return listener, server

    def _serve(self, listener: socket.socket, there: Path) -> None:
        """One connection after the other, as the TPM itself."""
        with suppress(OSError):  # the listener is shut down
            while True:
                host, _address = listener.accept()
                with host, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tpm:
                    tpm.connect(str(there))
                    self._forward(host, tpm)

    def _forward(self, host: socket.socket, tpm: socket.socket) -> None:
        while True:
            ready, _w, _x = select.select([host, tpm], [], [])
            data = ready[0].recv(8192)
            if not data:
                return
            self.heard += data
            if ready[0] is host:
                tpm.sendall(data)
            else:
                host.sendall(self.change(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener, server in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()
            listener.close()
