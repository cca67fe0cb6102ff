"""Builds `_direct`: the CRB interface of `crb_device.h` and `direct.h`. Needs OpenSSL's headers, version 3."""

from __future__ import annotations

import runpy
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).parent
_WIRE = _HERE.parents[1] / "wire"

ffibuilder = FFI()

ffibuilder.cdef(
    """
    enum crb_state { CRB_IDLE, CRB_READY, CRB_EXECUTION, CRB_COMPLETION, ... };
    enum crb_effect { CRB_NOTHING, CRB_EXECUTE, CRB_CANCEL, ... };
    struct crb_device { uint32_t state; bool granted; uint32_t error; };
    enum crb_effect crb_write(struct crb_device *device, uint32_t offset, uint32_t value);
    void crb_complete(struct crb_device *device, uint32_t error);
    uint32_t crb_loc_state(const struct crb_device *device);
    uint32_t crb_loc_sts(const struct crb_device *device);
    uint32_t crb_ctrl_sts(const struct crb_device *device);
    bool crb_is_frame_area(uint64_t address, uint64_t size);

    struct mailbox_session { uint8_t keys[2][32]; uint8_t vm_nonce[32]; ...; };
    bool mailbox_session_open(struct mailbox_session *session, const uint8_t (*keys)[32], const uint8_t *vm_nonce);
    bool mailbox_session_derive(struct mailbox_session *session, const uint8_t *boot_key, const uint8_t *sp_nonce,
                                const uint8_t *vm_nonce);
    void mailbox_session_close(struct mailbox_session *session);

    typedef int64_t direct_execute_function(const uint8_t *command, uint32_t size, uint8_t *response);
    enum direct_event { DIRECT_NOTHING, DIRECT_SERVED, DIRECT_CONTROL, DIRECT_COMMAND, DIRECT_STORED, DIRECT_FAILED,
                        DIRECT_REFUSED, ... };
    struct direct_interface {
        uint8_t *memory; int sp_doorbell; int vm_doorbell;
        direct_execute_function *execute; const uint32_t *stores;
        struct crb_device device;
        uint8_t boot_key[32]; uint8_t sp_nonce[32];
        bool has_session; struct mailbox_session session; uint64_t sequence;
        uint64_t executed; uint64_t refused;
        uint32_t command_size; uint32_t response_size; uint8_t command[4096]; uint8_t response[4096];
        ...;
    };
    bool direct_fresh_nonce(struct direct_interface *interface);
    enum direct_event direct_refuse(struct direct_interface *interface, uint32_t error);
    enum direct_event direct_answer(struct direct_interface *interface, uint32_t size);
    enum direct_event direct_serve(struct direct_interface *interface, int control, bool hold);
    bool direct_cancel_requested(struct direct_interface *interface);
    """
)

ffibuilder.set_source(
    "spvtpm.processor.interfaces._direct",
    runpy.run_path(str(_WIRE / "crb_header.py"))["c_definitions"]() + '#include "direct.h"\n',
    include_dirs=[str(_WIRE), str(_HERE)],
    libraries=["crypto"],
)
