"""Builds `_mailbox`: the frames of `mailbox.h` for Python. Needs OpenSSL's headers, version 3."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef(
    """
    #define MAILBOX_KEY_BYTES ...
    #define MAILBOX_NONCE_BYTES ...
    #define MAILBOX_ID_BYTES ...
    #define MAILBOX_HEADER_BYTES ...
    #define MAILBOX_OVERHEAD_BYTES ...
    #define MAILBOX_MAX_PAYLOAD_BYTES ...
    #define MAILBOX_MAX_FRAME_BYTES ...
    #define MAILBOX_MAX_SEQUENCE ...

    enum mailbox_direction { MAILBOX_COMMAND, MAILBOX_RESPONSE, ... };
    enum mailbox_result { MAILBOX_OK, MAILBOX_NO_ROOM, MAILBOX_NO_FRAME, MAILBOX_BAD_SEQUENCE, MAILBOX_BAD_SIZE,
                          MAILBOX_OTHER_PLACE, MAILBOX_NOT_AUTHENTIC, MAILBOX_CRYPTO_FAILED, ... };
    struct mailbox_header { uint32_t payload_bytes; uint64_t sequence; uint64_t address; uint8_t vm_nonce[32]; };
    struct mailbox_session { uint8_t keys[2][32]; uint8_t vm_nonce[32]; ...; };

    bool mailbox_derive_boot_key(const uint8_t *vm_key, const uint8_t *vm_id, const uint8_t *boot_id,
                                 uint8_t *boot_key);
    bool mailbox_session_derive(struct mailbox_session *session, const uint8_t *boot_key, const uint8_t *sp_nonce,
                                const uint8_t *vm_nonce);
    void mailbox_session_close(struct mailbox_session *session);
    enum mailbox_result mailbox_parse(const uint8_t *frame, size_t room, enum mailbox_direction direction,
                                      struct mailbox_header *header);
    enum mailbox_result mailbox_seal(struct mailbox_session *session, enum mailbox_direction direction,
                                     uint64_t sequence, uint64_t address, const uint8_t *payload, uint32_t size,
                                     uint8_t *frame);
    enum mailbox_result mailbox_open(struct mailbox_session *session, enum mailbox_direction direction,
                                     const struct mailbox_header *header, uint64_t address, const uint8_t *frame,
                                     uint8_t *payload);
    """
)

ffibuilder.set_source(
    "spvtpm.wire._mailbox",
    '#include "mailbox.h"',
    include_dirs=[str(Path(__file__).parent)],
    libraries=["crypto"],
)
