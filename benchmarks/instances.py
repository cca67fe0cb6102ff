"""How long a vTPM whose NV is full takes to leave as an instance file, and to come back."""

from __future__ import annotations

import os
import time
import uuid

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tests.harness import RunningSp
from tests.owner import OwnerChannel
from tests.tpm_commands import checked, nv_define, nv_write, response_code, startup

from benchmarks.report import Figure, Row, Section
from benchmarks.roundtrip import Progress, Transmit, no_garbage_collection
from spvtpm.wire import messages
from spvtpm.wire.instance_header import CHUNK_BYTES

_SAMPLES = 40
_TARGET_MS = 50.0
_INDEX_BYTES = 2048
_BUFFER_BYTES = 1024
"""What one TPM2_NV_Write takes. Source: TPM_PT_NV_BUFFER_MAX of libtpms."""

_FIRST_INDEX = 0x01500100
_clock = time.perf_counter_ns


def fill_nv(transmit: Transmit) -> None:
    """Fills a TPM that was started up until it takes no other NV index."""
    index = _FIRST_INDEX
    while not response_code(transmit(nv_define(index, _INDEX_BYTES))):
        for offset in range(0, _INDEX_BYTES, _BUFFER_BYTES):
            checked(transmit(nv_write(index, os.urandom(_BUFFER_BYTES), offset)))
        index += 1


def full_vtpm(sp: RunningSp) -> uuid.UUID:
    """A running VM whose vTPM takes no other NV index."""
    vm_id = sp.launch()
    with sp.driver(vm_id) as driver:
        checked(driver.transmit(startup()))
        fill_nv(driver.transmit)
    return vm_id


def _there_and_back(sp: RunningSp, channel: OwnerChannel, vm_id: uuid.UUID) -> tuple[int, int, bytes]:
    """Nanoseconds of the export, up to the answer that all is destroyed, and of the import; the file."""
    begin = _clock()
    file = channel.export(vm_id)
    exported = _clock()
    channel.bring(vm_id, sp.key(vm_id), file)
    return exported - begin, _clock() - exported, file


def _cipher_alone(file: bytes) -> int:
    """Nanoseconds of AES-256-GCM over the file's bytes, in its chunks."""
    cipher, nonce = AESGCM(bytes(32)), bytes(12)
    begin = _clock()
    for at in range(0, len(file), CHUNK_BYTES):
        cipher.encrypt(nonce, file[at : at + CHUNK_BYTES], None)
    return _clock() - begin


def measure_instances(sp: RunningSp, *, quick: bool, progress: Progress) -> Section:
    """Exports and imports of a full vTPM in an open channel."""
    progress("export and import of a full vTPM")
    samples = _SAMPLES // 4 if quick else _SAMPLES
    vm_id = full_vtpm(sp)
    sp.info(messages.StopVm(vm_id=vm_id))
    exports, imports, ciphers = list[int](), list[int](), list[int]()
    file = b""
    with sp.channel() as channel, no_garbage_collection():
        for _ in range(samples):
            export_ns, import_ns, file = _there_and_back(sp, channel, vm_id)
            exports.append(export_ns)
            imports.append(import_ns)
            ciphers.append(_cipher_alone(file))
    sp.destroy(vm_id)
    size = f"file of {len(file) >> 10} KiB"
    return Section(
        "Instance files",
        [
            Row(
                f"export, acknowledged, all destroyed ({size})", "ms", Figure.of_times(exports, "ms"), target=_TARGET_MS
            ),
            Row(f"import, durable ({size})", "ms", Figure.of_times(imports, "ms"), target=_TARGET_MS),
            Row("AES-256-GCM over the same bytes, alone", "ms", Figure.of_times(ciphers, "ms")),
        ],
        ["A vTPM with no room in its NV for another index. In a channel that is open; opening one takes some 10 ms."],
    )
