"""Target for TPM commands: a guest's worst at a real TPM, in a child process whose crash is a finding."""

from __future__ import annotations

import atexit
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import tpm_commands as tpm

from fuzz.program import Program
from fuzz.target import Target
from spvtpm.wire.framing import FrameDecoder, encode_frame

_PATIENCE_S = 120.0
"""More than an RSA key takes."""

_MOST_COMMANDS = 12
_KEY = 0x80000000
_NV = 0x01500001
_RESPONSE_TAGS = (0x8001, 0x8002, 0x00C4)
"""TPM_ST_NO_SESSIONS, TPM_ST_SESSIONS, TPM_ST_RSP_COMMAND. Source: TCG TPM 2.0 Library Part 2, table "TPM_ST"."""

_COMMAND_CODES = range(0x11F, 0x1A0)
"""TPM_CC_FIRST to beyond TPM_CC_LAST."""

_GOOD: tuple[bytes, ...] = (
    *(tpm.startup(), tpm.startup(clear=False), tpm.shutdown(), tpm.shutdown(clear=False), tpm.self_test(full=False)),
    *(tpm.get_random(32), tpm.stir_random(bytes(64)), tpm.read_clock(), tpm.get_capability(6, 0x100, 127), tpm.clear()),
    *(tpm.get_capability(5, 0, 64), tpm.pp_commands(0x126), tpm.pcr_extend(16, bytes(32)), tpm.pcr_read(0)),
    *(tpm.pcr_reset(16), tpm.nv_define(0x01500002, 2048), tpm.nv_write(_NV, bytes(64)), tpm.nv_read(_NV, 64)),
    *(tpm.nv_undefine(_NV), tpm.create_primary(tpm.ecc_p256(tpm.SIGNING_KEY)), tpm.flush_context(_KEY)),
    *(tpm.create_primary(tpm.ecc_p256(unique=b"u" * 32), tpm.ENDORSEMENT), tpm.evict_control(_KEY, 0x81000001)),
    *(tpm.read_public(_KEY), tpm.sign(_KEY + 1, bytes(32)), tpm.command(0x176, 0x40000007, 0x40000007)),
    # StartAuthSession, HashSequenceStart, ContextSave, Create under the primary key, PolicyPCR, GetTestResult
    tpm.command(
        0x176, 0x40000007, 0x40000007, parameters=tpm.sized(b"n" * 16) + tpm.sized(b"") + b"\1\0\x10" + b"\0\x0b"
    ),
    tpm.command(0x186, parameters=tpm.sized(b"") + b"\0\x0b"),
    tpm.command(0x162, _KEY),
    tpm.command(
        0x153,
        _KEY,
        auth=b"",
        parameters=tpm.sized(bytes(4)) + tpm.sized(tpm.ecc_p256(tpm.SIGNING_KEY)) + tpm.sized(b"") + bytes(4),
    ),
    tpm.command(0x17F, 0x03000000, parameters=tpm.sized(b"") + struct.pack(">IHB", 1, tpm.SHA256, 3) + bytes(3)),
    tpm.command(0x17C),
)


class _Child:
    """The process, started again when it has died."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.tpm_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=Path(__file__).parent.parent,
        )
        atexit.register(self.end)

    def run(self, commands: Sequence[bytes]) -> list[bytes]:
        """The responses.

        Raises:
            AssertionError: it died, or takes too long.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        output = self._process.stdout
        decoder = FrameDecoder()
        deadline = time.monotonic() + _PATIENCE_S
        try:
            self._process.stdin.write(encode_frame(b"".join(map(encode_frame, commands))))
            self._process.stdin.flush()
            while select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                piece = output.read1(65536)  # type: ignore[attr-defined]  # a buffered reader
                if not piece:
                    break
                for answer in decoder.feed(piece):
                    return FrameDecoder().feed(answer)
        except BrokenPipeError:
            pass
        raise AssertionError(f"the TPM's process did not answer: {self.end()}")

    def end(self) -> str:
        """Ends it; what is known of its death."""
        atexit.unregister(self.end)
        deadline = time.monotonic() + 1
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        how = "it hung" if self._process.poll() is None else f"it ended with status {self._process.returncode}"
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")
        self._log.close()
        return f"{how}\n{said}".rstrip()


class _Tpm:
    """The one child of this process."""

    def __init__(self) -> None:
        self._child: _Child | None = None

    def run(self, commands: Sequence[bytes]) -> list[bytes]:
        """The responses; a child that failed is replaced the next time."""
        child = self._child if self._child is not None else _Child()
        self._child = None
        responses = child.run(commands)
        self._child = child
        return responses


_tpm = _Tpm()


def _raw(program: Program) -> bytes:
    """A command of any code, with handles and parameters as they come, and perhaps a password session."""
    handles = [
        program.choose((_KEY, _NV, tpm.OWNER, tpm.PLATFORM, 0x80FFFFFF, 0x02000000)) for _ in range(program.below(4))
    ]
    parameters = program.take(program.below(64))
    auth = b"" if program.below(2) else None
    return tpm.command(program.choose(_COMMAND_CODES), *handles, parameters=parameters, auth=auth)


def _mended(command: bytes) -> bytes:
    """The command with its size field as it should be: most damage would only meet the first check."""
    return command[:2] + struct.pack(">I", len(command)) + command[6:]


def _commands(program: Program) -> list[bytes]:
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: program.choose(_GOOD),
        lambda: _mended(program.damage(program.choose(_GOOD))),
        lambda: _mended(program.damage(program.choose(_GOOD))),
        lambda: program.damage(program.choose(_GOOD)),
        lambda: _mended(program.damage(_raw(program))),
        lambda: program.take(1 + program.below(64)),
    )
    commands: list[bytes] = []
    while program and len(commands) < _MOST_COMMANDS:
        command = program.choose(makers)()[:4096]
        if command:
            commands.append(command)
    return commands


def fuzz_tpm(data: bytes) -> None:
    """TPM commands: each is answered by a whole response, and the TPM can be parked and woken afterwards."""
    commands = _commands(Program(data))
    if not commands:
        return
    responses = _tpm.run(commands)
    assert len(responses) == len(commands), "each command has its response"
    for response in responses:
        assert len(response) >= 10, "a response has a header"
        tag, size, _code = struct.unpack_from(">HII", response)
        assert tag in _RESPONSE_TAGS and size == len(response) <= 4096, "a response is as long as it says"


def _seeds() -> Sequence[bytes]:
    return [bytes([0, number, 2, number, 5, 0, 3, 0, 1, number]) for number in range(len(_GOOD))]


TPM_TARGETS = (
    Target("tpm", "TPM commands at a real TPM, in a child process", fuzz_tpm, _seeds, examples=150, longest=512),
)
