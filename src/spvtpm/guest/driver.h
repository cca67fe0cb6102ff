/* The VM's side of the direct path: seals a command into shared memory, rings, and takes the response out.

   The memory is the host's: what is read from it is copied once and then checked. */

#ifndef SPVTPM_DRIVER_H
#define SPVTPM_DRIVER_H

#include <sched.h>

#include "mailbox.h"
#include "shared_memory.h"

/* How long to look for the response before sleeping on the doorbell: most commands take less than a wake-up. The core is
   yielded meanwhile. */
#define DRIVER_SPIN_NS 500000

enum driver_result {
    DRIVER_WAITING = 0, /* no response yet: sleep on the doorbell, then driver_take() */
    DRIVER_REFUSED = -1, /* CTRL_STS.tpmSts: the attach page says why */
    DRIVER_OTHER = -2,   /* the response is not that of this command */
    DRIVER_FRAME = -3,   /* the response is no authentic frame: `frame_error` says why */
};

struct crb_driver {
    uint8_t *memory; /* shared, CRB_MEMORY_BYTES */
    volatile uint32_t *doorbell_register; /* of the PCI device, in a guest; NULL: `sp_doorbell` is an eventfd */
    int sp_doorbell;
    struct mailbox_session *session;
    uint64_t sequence;
    enum mailbox_result frame_error;
    uint8_t response[MAILBOX_MAX_PAYLOAD_BYTES];
    uint8_t frame[MAILBOX_MAX_FRAME_BYTES];
};

/* Tells the SP to look. In a register of the PCI device, the high half is the peer, the low half its interrupt: the SP is
   peer 1 and has one. Source: QEMU, docs/specs/ivshmem-spec.rst, "Device Registers"; docs/formats/ivshmem-offer.md. */
static void driver_ring(const struct crb_driver *driver)
{
    if (driver->doorbell_register == NULL) {
        doorbell_ring(driver->sp_doorbell);
        return;
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what is in memory comes before the ring */
    *driver->doorbell_register = htole32(1u << 16);
}

/* The size of the response in `response`, or an enum driver_result. */
static int driver_open(struct crb_driver *driver)
{
    struct mailbox_header header;

    shared_copy(driver->frame, driver->memory + CRB_RESPONSE_ADDRESS, MAILBOX_HEADER_BYTES);
    driver->frame_error = mailbox_parse(driver->frame, MAILBOX_MAX_FRAME_BYTES, MAILBOX_RESPONSE, &header);
    if (driver->frame_error != MAILBOX_OK)
        return DRIVER_FRAME;
    if (header.sequence != driver->sequence)
        return DRIVER_OTHER;
    shared_copy(driver->frame + MAILBOX_HEADER_BYTES, driver->memory + CRB_RESPONSE_ADDRESS + MAILBOX_HEADER_BYTES,
                header.payload_bytes + MAILBOX_TAG_BYTES);
    driver->frame_error = mailbox_open(driver->session, MAILBOX_RESPONSE, &header, CRB_RESPONSE_ADDRESS, driver->frame,
                                       driver->response);
    return driver->frame_error == MAILBOX_OK ? (int)header.payload_bytes : DRIVER_FRAME;
}

/* Looks whether the command has ended; as driver_open(). */
static int driver_take(struct crb_driver *driver)
{
    if (shared_load(driver->memory, CRB_CTRL_START) != 0)
        return DRIVER_WAITING;
    if ((shared_load(driver->memory, CRB_CTRL_STS) & CTRL_STS_TPM_STS) != 0)
        return DRIVER_REFUSED;
    return driver_open(driver);
}

/* Sends a command of 1 to MAILBOX_MAX_PAYLOAD_BYTES bytes and looks for its response for a while; as driver_open(). */
static int driver_transmit(struct crb_driver *driver, const uint8_t *command, uint32_t size)
{
    int result;
    int64_t sleep_after;

    driver->sequence++;
    driver->frame_error = mailbox_seal(driver->session, MAILBOX_COMMAND, driver->sequence, CRB_COMMAND_ADDRESS, command,
                                       size, driver->frame);
    if (driver->frame_error != MAILBOX_OK)
        return DRIVER_FRAME;
    memcpy(driver->memory + CRB_COMMAND_ADDRESS, driver->frame, MAILBOX_OVERHEAD_BYTES + size);
    shared_store(driver->memory, CRB_CTRL_REQ, CTRL_REQ_CMD_READY);
    shared_store(driver->memory, CRB_CTRL_CANCEL, 0);
    shared_store(driver->memory, CRB_CTRL_START, 1);
    driver_ring(driver);
    sleep_after = clock_now() + DRIVER_SPIN_NS;
    while ((result = driver_take(driver)) == DRIVER_WAITING && clock_now() < sleep_after)
        sched_yield();
    return result;
}

#endif
