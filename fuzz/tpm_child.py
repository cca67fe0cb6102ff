"""A process with a real TPM in it, for commands that may crash it: `python -m fuzz.tpm_child`, spoken to by tpm_targets.py.

Each request (a frame of frames: the commands) is run on the TPM as it was after its first start; then the TPM is parked and
woken. The answer is a frame of frames too: the responses.
"""

from __future__ import annotations

import sys
from typing import BinaryIO

from tests import tpm_commands as tpm

from spvtpm.engine.libtpms import Engine
from spvtpm.wire.framing import FrameDecoder, encode_frame


class _ParkedTpm:
    """One TPM that begins every program in the same state."""

    def __init__(self) -> None:
        self._latest = b""
        self._engine = Engine(self._store)
        self._engine.manufacture()
        for command in (tpm.startup(), tpm.create_primary(tpm.ecc_p256()), tpm.nv_define(0x01500001, 64)):
            tpm.checked(self._engine.process(command))
        self._start = self._engine.permanent_state(), self._engine.volatile_state()

    def _store(self, permanent: bytes) -> None:
        self._latest = permanent

    def run(self, commands: list[bytes]) -> list[bytes]:
        """The responses; afterwards the TPM could be parked and woken."""
        engine = self._engine
        engine.power_off()
        engine.resume(*self._start)
        responses = [engine.process(command) for command in commands]
        permanent, volatile = engine.permanent_state(), engine.volatile_state()
        engine.power_off()
        engine.resume(permanent, volatile)
        return responses


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers until the requests end."""
    tpm_ = _ParkedTpm()
    decoder = FrameDecoder()
    while piece := requests.read1(65536):  # type: ignore[attr-defined]  # a buffered reader
        for program in decoder.feed(piece):
            responses = tpm_.run(FrameDecoder().feed(program))
            answers.write(encode_frame(b"".join(map(encode_frame, responses))))
            answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
