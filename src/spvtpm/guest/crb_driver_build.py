"""Builds `_crb_driver`: the VM's driver of `driver.h`. Needs OpenSSL's headers, version 3."""

from __future__ import annotations

import runpy
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).parent
_WIRE = _HERE.parent / "wire"

ffibuilder = FFI()

ffibuilder.cdef(
    """
    struct mailbox_session;
    enum driver_result { DRIVER_WAITING, DRIVER_REFUSED, DRIVER_OTHER, DRIVER_FRAME, ... };
    struct crb_driver {
        uint8_t *memory; volatile uint32_t *doorbell_register; int sp_doorbell;
        struct mailbox_session *session; uint64_t sequence; int frame_error; uint8_t response[4096];
        ...;
    };
    uint8_t *registers_map(int device);
    void registers_unmap(uint8_t *page);
    void driver_ring(const struct crb_driver *driver);
    int driver_transmit(struct crb_driver *driver, const uint8_t *command, uint32_t size);
    int driver_take(struct crb_driver *driver);
    """
)

ffibuilder.set_source(
    "spvtpm.guest._crb_driver",
    runpy.run_path(str(_WIRE / "crb_header.py"))["c_definitions"]()
    + '#include "driver.h"\n#include "pci_registers.h"\n',
    include_dirs=[str(_WIRE), str(_HERE)],
    libraries=["crypto"],
)
