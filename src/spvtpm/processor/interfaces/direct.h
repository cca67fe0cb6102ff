/* The direct path: the CRB interface in memory shared with the VM, served without anyone in between.

   Everything in that memory is hostile and may change at any moment. Registers are read in one copy, each byte of a frame
   is read once; the copies are checked and used (no second fetch). What is written there is ciphertext and register values.

   An ordinary command is executed here, through a function of the TPM engine. What needs more comes back to the caller
   as an event: an order of the SP, a command that can run long, a change that must become durable before its answer. */

#ifndef SPVTPM_DIRECT_H
#define SPVTPM_DIRECT_H

#include <poll.h>
#include <sched.h>
#include <sys/random.h>

#include "crb_device.h"
#include "mailbox.h"
#include "shared_memory.h"

/* After it has served something, the worker looks for more this long before it sleeps on the doorbell: waking up costs more
   than most commands. It yields its core while it looks. */
#define DIRECT_SPIN_NS 50000
/* A VM that never pauses keeps the SP waiting for its orders no longer than this. */
#define DIRECT_CONTROL_NS 1000000

/* Commands that can generate RSA keys, the only ones long enough to be worth cancelling; libtpms looks at its cancel flag
   nowhere else. Source: TCG TPM 2.0 Library Part 2, table "TPM_CC constants". */
enum { TPM_CC_CREATE_PRIMARY = 0x131, TPM_CC_CREATE = 0x153, TPM_CC_CREATE_LOADED = 0x191 };

typedef int64_t direct_execute_function(const uint8_t *command, uint32_t size, uint8_t *response);

enum direct_event {
    DIRECT_NOTHING, /* the VM has written nothing */
    DIRECT_SERVED,
    DIRECT_CONTROL, /* the SP has something to say */
    DIRECT_COMMAND, /* a command waits in `command`, for direct_answer() or direct_refuse() */
    DIRECT_STORED,  /* executed; `response` waits until the change is durable, likewise */
    DIRECT_FAILED,  /* the engine cannot execute it, likewise */
    DIRECT_REFUSED, /* frames were refused; comes at counts 1, 2, 4, 8, … so that a flood stays quiet */
};

struct direct_interface {
    uint8_t *memory; /* shared, CRB_MEMORY_BYTES */
    int sp_doorbell;
    int vm_doorbell;
    direct_execute_function *execute;
    const uint32_t *stores; /* how often the engine has handed out a changed permanent state */

    struct crb_device device;
    uint8_t boot_key[MAILBOX_KEY_BYTES];
    uint8_t sp_nonce[MAILBOX_NONCE_BYTES]; /* offered for the next session */
    bool has_session;
    struct mailbox_session session;
    uint64_t sequence; /* the last one executed */

    uint64_t executed;
    uint64_t refused;
    int64_t look_after; /* when to look for orders of the SP again, though the VM never pauses */

    /* The command under way. */
    uint64_t response_address;
    uint32_t response_room;
    uint32_t command_size;
    uint32_t response_size;
    uint8_t command[MAILBOX_MAX_PAYLOAD_BYTES];
    uint8_t response[MAILBOX_MAX_PAYLOAD_BYTES];
    uint8_t frame[MAILBOX_MAX_FRAME_BYTES];
};

static bool direct_fresh_nonce(struct direct_interface *interface)
{
    return getrandom(interface->sp_nonce, MAILBOX_NONCE_BYTES, 0) == MAILBOX_NONCE_BYTES;
}

/* Shows the VM that a command has ended. CTRL_START comes last, for whoever watches it; no other register is touched, since
   the VM may write its next request as soon as it sees that. */
static void direct_publish_end(struct direct_interface *interface)
{
    shared_store(interface->memory, CRB_CTRL_STS, crb_ctrl_sts(&interface->device));
    shared_store(interface->memory, CRB_CTRL_CANCEL, 0);
    shared_store(interface->memory, CRB_CTRL_START, 0);
    doorbell_ring(interface->vm_doorbell);
}

/* Ends the command under way without an answer. */
static enum direct_event direct_refuse(struct direct_interface *interface, uint32_t error)
{
    crb_complete(&interface->device, error);
    shared_store(interface->memory, CRB_ATTACH_ERROR_OFFSET, error);
    direct_publish_end(interface);
    interface->refused++;
    return (interface->refused & (interface->refused - 1)) == 0 ? DIRECT_REFUSED : DIRECT_SERVED;
}

/* Ends the command under way with its response, which lies in `response`. */
static enum direct_event direct_answer(struct direct_interface *interface, uint32_t size)
{
    if (size > MAILBOX_MAX_PAYLOAD_BYTES || MAILBOX_OVERHEAD_BYTES + size > interface->response_room)
        return direct_refuse(interface, ATTACH_RESPONSE_TOO_LONG);
    if (mailbox_seal(&interface->session, MAILBOX_RESPONSE, interface->sequence, interface->response_address,
                     interface->response, size, interface->frame)
        != MAILBOX_OK)
        return direct_refuse(interface, ATTACH_TPM_FAILED);
    memcpy(interface->memory + interface->response_address, interface->frame, MAILBOX_OVERHEAD_BYTES + size);
    crb_complete(&interface->device, ATTACH_NONE);
    direct_publish_end(interface);
    return DIRECT_SERVED;
}

/* The session's frame was authentic. The nonce that a new session used is spent: the same frame can never open one again. */
static bool direct_accept_session(struct direct_interface *interface, struct mailbox_session *session)
{
    if (!direct_fresh_nonce(interface))
        return false;
    if (interface->has_session)
        mailbox_session_close(&interface->session);
    interface->session = *session;
    interface->has_session = true;
    memcpy(interface->memory + CRB_ATTACH_NONCE_OFFSET, interface->sp_nonce, MAILBOX_NONCE_BYTES);
    return true;
}

/* Opens the frame in `frame` into `command`. Returns an ATTACH_ error. */
static uint32_t direct_open(struct direct_interface *interface, const struct mailbox_header *header, uint64_t address)
{
    struct mailbox_session candidate;

    if (interface->has_session && memcmp(header->vm_nonce, interface->session.vm_nonce, MAILBOX_NONCE_BYTES) == 0) {
        if (header->sequence <= interface->sequence)
            return ATTACH_REPLAYED;
        if (mailbox_open(&interface->session, MAILBOX_COMMAND, header, address, interface->frame, interface->command)
            != MAILBOX_OK)
            return ATTACH_NOT_AUTHENTIC;
    } else {
        if (!mailbox_session_derive(&candidate, interface->boot_key, interface->sp_nonce, header->vm_nonce))
            return ATTACH_NOT_AUTHENTIC;
        if (mailbox_open(&candidate, MAILBOX_COMMAND, header, address, interface->frame, interface->command) != MAILBOX_OK
            || !direct_accept_session(interface, &candidate)) {
            mailbox_session_close(&candidate);
            return ATTACH_NOT_AUTHENTIC;
        }
    }
    interface->sequence = header->sequence;
    interface->command_size = header->payload_bytes;
    return ATTACH_NONE;
}

/* Fetches the frame that the registers point at, and opens it. Returns an ATTACH_ error. */
static uint32_t direct_fetch(struct direct_interface *interface)
{
    const uint8_t *memory = interface->memory;
    uint64_t address = (uint64_t)shared_load(memory, CRB_CTRL_CMD_HADDR) << 32 | shared_load(memory, CRB_CTRL_CMD_LADDR);
    uint32_t room = shared_load(memory, CRB_CTRL_CMD_SIZE);
    uint64_t response_address = (uint64_t)shared_load(memory, CRB_CTRL_RSP_ADDR + 4) << 32
                                | shared_load(memory, CRB_CTRL_RSP_ADDR);
    uint32_t response_room = shared_load(memory, CRB_CTRL_RSP_SIZE);
    struct mailbox_header header;

    room = room < MAILBOX_MAX_FRAME_BYTES ? room : MAILBOX_MAX_FRAME_BYTES;
    response_room = response_room < MAILBOX_MAX_FRAME_BYTES ? response_room : MAILBOX_MAX_FRAME_BYTES;
    if (!crb_is_frame_area(address, room) || !crb_is_frame_area(response_address, response_room))
        return ATTACH_BAD_ADDRESS;
    if (room < MAILBOX_OVERHEAD_BYTES)
        return ATTACH_BAD_FRAME;
    interface->response_address = response_address;
    interface->response_room = response_room;
    shared_copy(interface->frame, memory + address, MAILBOX_HEADER_BYTES);
    if (mailbox_parse(interface->frame, room, MAILBOX_COMMAND, &header) != MAILBOX_OK)
        return ATTACH_BAD_FRAME;
    shared_copy(interface->frame + MAILBOX_HEADER_BYTES, memory + address + MAILBOX_HEADER_BYTES,
                header.payload_bytes + MAILBOX_TAG_BYTES);
    return direct_open(interface, &header, address);
}

static bool direct_can_run_long(const struct direct_interface *interface)
{
    uint32_t code;

    if (interface->command_size < 10)
        return false;
    memcpy(&code, interface->command + 6, sizeof code);
    code = be32toh(code);
    return code == TPM_CC_CREATE_PRIMARY || code == TPM_CC_CREATE || code == TPM_CC_CREATE_LOADED;
}

static enum direct_event direct_run(struct direct_interface *interface, bool hold)
{
    uint32_t error = direct_fetch(interface);
    uint32_t stores;
    int64_t size;

    if (error != ATTACH_NONE)
        return direct_refuse(interface, error);
    interface->executed++;
    if (hold || direct_can_run_long(interface))
        return DIRECT_COMMAND;
    stores = *interface->stores;
    size = interface->execute(interface->command, interface->command_size, interface->response);
    if (size <= 0)
        return DIRECT_FAILED;
    interface->response_size = (uint32_t)size;
    return *interface->stores != stores ? DIRECT_STORED : direct_answer(interface, interface->response_size);
}

/* Takes what the VM has written, without waiting. Only registers in which something was found are cleared: the VM may be
   writing the others at this moment.

   hold: hand every command out, execute none here. */
static enum direct_event direct_service(struct direct_interface *interface, bool hold)
{
    struct crb_device *device = &interface->device;
    uint32_t start = shared_load(interface->memory, CRB_CTRL_START); /* first: what it relies on was written before it */
    uint32_t request = shared_load(interface->memory, CRB_CTRL_REQ);
    uint32_t locality = shared_load(interface->memory, CRB_LOC_CTRL);

    if ((start | request | locality) == 0)
        return DIRECT_NOTHING;
    if (locality != 0) {
        crb_write(device, CRB_LOC_CTRL, locality);
        shared_store(interface->memory, CRB_LOC_STATE, crb_loc_state(device));
        shared_store(interface->memory, CRB_LOC_STS, crb_loc_sts(device));
        shared_store(interface->memory, CRB_LOC_CTRL, 0);
    }
    if (request != 0) {
        crb_write(device, CRB_CTRL_REQ, request);
        shared_store(interface->memory, CRB_CTRL_STS, crb_ctrl_sts(device));
        shared_store(interface->memory, CRB_CTRL_REQ, 0);
    }
    if (start == 0) {
        doorbell_ring(interface->vm_doorbell);
        return DIRECT_SERVED;
    }
    if (crb_write(device, CRB_CTRL_START, start) == CRB_EXECUTE)
        return direct_run(interface, hold);
    direct_publish_end(interface);
    return DIRECT_SERVED;
}

/* Whether the VM has written CTRL_CANCEL while a command runs; asked from another thread. */
static bool direct_cancel_requested(struct direct_interface *interface)
{
    return crb_write(&interface->device, CRB_CTRL_CANCEL, shared_load(interface->memory, CRB_CTRL_CANCEL)) == CRB_CANCEL;
}

static bool direct_is_readable(int descriptor)
{
    struct pollfd look = {.fd = descriptor, .events = POLLIN};

    return poll(&look, 1, 0) > 0;
}

/* Takes the rings that wait, and what they were about: none is left to wake a vTPM that is about to be parked. */
static enum direct_event direct_turn_to_control(struct direct_interface *interface, bool hold)
{
    enum direct_event event;

    doorbell_drain(interface->sp_doorbell);
    event = direct_service(interface, hold);
    return event > DIRECT_SERVED ? event : DIRECT_CONTROL;
}

/* Serves the VM until something needs the caller: an event above DIRECT_SERVED.

   control: descriptor that is readable when the SP has something to say. */
static enum direct_event direct_serve(struct direct_interface *interface, int control, bool hold)
{
    struct pollfd waits[] = {{.fd = interface->sp_doorbell, .events = POLLIN}, {.fd = control, .events = POLLIN}};
    int64_t sleep_after = 0;

    for (;;) {
        enum direct_event event = direct_service(interface, hold);
        int64_t now = clock_now();

        if (event > DIRECT_SERVED)
            return event;
        if (event == DIRECT_SERVED) {
            sleep_after = now + DIRECT_SPIN_NS;
            if (now < interface->look_after)
                continue;
            interface->look_after = now + DIRECT_CONTROL_NS;
            if (direct_is_readable(control))
                return direct_turn_to_control(interface, hold);
        } else if (now < sleep_after) {
            sched_yield();
        } else if (poll(waits, 2, -1) > 0) {
            if (waits[1].revents != 0)
                return direct_turn_to_control(interface, hold);
            doorbell_drain(interface->sp_doorbell);
        }
    }
}

#endif
