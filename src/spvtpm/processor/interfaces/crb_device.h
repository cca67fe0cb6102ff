/* The vTPM's side of the CRB interface as a pure state machine: register writes in, register values and effects out.

   No memory, no process, no cryptography: direct.h is the shell that finds the writes in shared memory. States and
   transitions are those of the PTP; "Command Reception" is part of READY here, because writes to the buffer are not
   trapped. A write that the PTP leaves undefined changes nothing.

   Life: IDLE without locality, the VM requests access, cmdReady: READY, start: EXECUTION, crb_complete(): COMPLETION, then
   cmdReady (READY) or goIdle (IDLE). Relinquishing the locality leads to IDLE.

   Source: TCG PC Client Platform TPM Profile Specification 1.05, section 6.5.3.8, "CRB state machine". Offsets and bits are
   defined by crb.py (crb_header.py). */

#ifndef SPVTPM_CRB_DEVICE_H
#define SPVTPM_CRB_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

enum crb_state { CRB_IDLE, CRB_READY, CRB_EXECUTION, CRB_COMPLETION };

enum crb_effect { CRB_NOTHING, CRB_EXECUTE, CRB_CANCEL };

/* Locality 0 of one interface. */
struct crb_device {
    uint32_t state;
    bool granted;
    uint32_t error; /* an ATTACH_ error */
};

static void crb_write_loc_ctrl(struct crb_device *device, uint32_t value)
{
    if (value == LOC_CTRL_REQUEST_ACCESS) {
        device->granted = true;
    } else if (value == LOC_CTRL_RELINQUISH && device->granted) {
        device->granted = false;
        device->state = CRB_IDLE;
        device->error = ATTACH_NONE;
    }
    /* Seize needs a higher locality than 0, resetting the established bit locality 3 or 4: neither exists here. */
}

static void crb_write_ctrl_req(struct crb_device *device, uint32_t value)
{
    if (value != CTRL_REQ_CMD_READY && value != CTRL_REQ_GO_IDLE)
        return;
    device->state = value == CTRL_REQ_CMD_READY ? CRB_READY : CRB_IDLE;
    device->error = ATTACH_NONE;
}

/* One register write by the VM: any value, to any register. Those not named here are plain memory, checked when used. */
static enum crb_effect crb_write(struct crb_device *device, uint32_t offset, uint32_t value)
{
    if (device->state == CRB_EXECUTION)
        return offset == CRB_CTRL_CANCEL && value == 1 ? CRB_CANCEL : CRB_NOTHING;
    if (offset == CRB_LOC_CTRL) {
        crb_write_loc_ctrl(device, value);
    } else if (offset == CRB_CTRL_REQ && device->granted) {
        crb_write_ctrl_req(device, value);
    } else if (offset == CRB_CTRL_START && value == 1 && device->granted && device->state == CRB_READY) {
        device->state = CRB_EXECUTION;
        return CRB_EXECUTE;
    }
    return CRB_NOTHING;
}

/* The command under way has ended: answered (ATTACH_NONE), or not, and why. */
static void crb_complete(struct crb_device *device, uint32_t error)
{
    device->state = CRB_COMPLETION;
    device->error = error;
}

/* tpmEstablished is inverted: 1 means that no dynamic launch has taken place. */
static uint32_t crb_loc_state(const struct crb_device *device)
{
    return LOC_STATE_TPM_ESTABLISHED | LOC_STATE_TPM_REG_VALID | (device->granted ? LOC_STATE_LOC_ASSIGNED : 0);
}

static uint32_t crb_loc_sts(const struct crb_device *device)
{
    return device->granted ? LOC_STS_GRANTED : 0;
}

static uint32_t crb_ctrl_sts(const struct crb_device *device)
{
    return (device->state == CRB_IDLE ? CTRL_STS_TPM_IDLE : 0) | (device->error != ATTACH_NONE ? CTRL_STS_TPM_STS : 0);
}

/* Whether `size` bytes at `address` lie wholly where frames may lie: never over registers or the attach page. */
static bool crb_is_frame_area(uint64_t address, uint64_t size)
{
    if (size == 0 || size > CRB_MEMORY_BYTES || address > CRB_MEMORY_BYTES - size)
        return false;
    if (address >= CRB_COMMAND_ADDRESS)
        return true;
    return address >= CRB_DATA_BUFFER && address + size <= CRB_DATA_BUFFER + CRB_DATA_BUFFER_BYTES;
}

#endif
