/* The VM's side of the direct path: seals a command into shared memory, rings, and takes the response out.

   The memory is the host's: what is read from it is copied once and then checked. */

#ifndef SPVTPM_DRIVER_H
#define SPVTPM_DRIVER_H

#include <errno.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "mailbox.h"

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
    int sp_doorbell;
    struct mailbox_session *session;
    uint64_t sequence;
    enum mailbox_result frame_error;
    uint8_t response[MAILBOX_MAX_PAYLOAD_BYTES];
    uint8_t frame[MAILBOX_MAX_FRAME_BYTES];
};

static uint32_t driver_load(const struct crb_driver *driver, uint32_t offset)
{
    return le32toh(__atomic_load_n((const uint32_t *)(driver->memory + offset), __ATOMIC_ACQUIRE));
}

static void driver_store(struct crb_driver *driver, uint32_t offset, uint32_t value)
{
    __atomic_store_n((uint32_t *)(driver->memory + offset), htole32(value), __ATOMIC_RELEASE);
}

static void driver_ring(const struct crb_driver *driver)
{
    const uint64_t one = 1;

    /* An SP whose counter is full is awake. */
    while (write(driver->sp_doorbell, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* The size of the response in `response`, or an enum driver_result. */
static int driver_open(struct crb_driver *driver)
{
    struct mailbox_header header;

    memcpy(driver->frame, driver->memory + CRB_RESPONSE_ADDRESS, MAILBOX_HEADER_BYTES);
    __asm__ __volatile__("" ::: "memory");
    driver->frame_error = mailbox_parse(driver->frame, MAILBOX_MAX_FRAME_BYTES, MAILBOX_RESPONSE, &header);
    if (driver->frame_error != MAILBOX_OK)
        return DRIVER_FRAME;
    if (header.sequence != driver->sequence)
        return DRIVER_OTHER;
    memcpy(driver->frame + MAILBOX_HEADER_BYTES, driver->memory + CRB_RESPONSE_ADDRESS + MAILBOX_HEADER_BYTES,
           header.payload_bytes + MAILBOX_TAG_BYTES);
    __asm__ __volatile__("" ::: "memory");
    driver->frame_error = mailbox_open(driver->session, MAILBOX_RESPONSE, &header, CRB_RESPONSE_ADDRESS, driver->frame,
                                       driver->response);
    return driver->frame_error == MAILBOX_OK ? (int)header.payload_bytes : DRIVER_FRAME;
}

/* Looks whether the command has ended; as driver_open(). */
static int driver_take(struct crb_driver *driver)
{
    if (driver_load(driver, CRB_CTRL_START) != 0)
        return DRIVER_WAITING;
    if ((driver_load(driver, CRB_CTRL_STS) & CTRL_STS_TPM_STS) != 0)
        return DRIVER_REFUSED;
    return driver_open(driver);
}

static int64_t driver_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
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
    driver_store(driver, CRB_CTRL_REQ, CTRL_REQ_CMD_READY);
    driver_store(driver, CRB_CTRL_CANCEL, 0);
    driver_store(driver, CRB_CTRL_START, 1);
    driver_ring(driver);
    sleep_after = driver_now() + DRIVER_SPIN_NS;
    while ((result = driver_take(driver)) == DRIVER_WAITING && driver_now() < sleep_after)
        sched_yield();
    return result;
}

#endif
