/* libFuzzer on direct.h: a VM that writes registers and memory, seals frames with the right key or damages them, and rings.

   The input is a program; operations are those of `run`. After each step: nothing was written but the registers of the SP, two
   fields of the attach page and the response's frame; what was executed had been sealed by the VM under the keys of a session
   of this boot; no sequence was executed twice; a response opens to what the TPM answered. AddressSanitizer sees every read
   and write beside the memory, which is exactly as long as it must be.

   --scribble: a second thread writes the memory while it is served; then what may have changed is not checked. */

#include "program.h"

#include "direct.h"

#define MAX_CLIENTS 8
#define MAX_SEALED 48
#define MAX_EXECUTED 96

struct client {
    uint8_t sp_nonce[MAILBOX_NONCE_BYTES];
    struct mailbox_session session;
    uint64_t sequence;
};

struct sealed {
    unsigned client;
    uint64_t sequence;
    uint64_t fingerprint;
    uint64_t address;
    uint32_t frame_bytes;
    uint8_t frame[MAILBOX_MAX_FRAME_BYTES];
};

static struct machine {
    struct direct_interface *interface; /* by itself on the heap: so are its borders seen */
    int control;
    uint8_t *before;
    unsigned clients;
    struct client client[MAX_CLIENTS];
    unsigned sealed_count;
    struct sealed sealed[MAX_SEALED];
    unsigned executed_count;
    struct {
        uint8_t key[MAILBOX_KEY_BYTES];
        uint64_t sequence;
    } executed[MAX_EXECUTED];

    /* What the TPM does with the next command, and what it saw. */
    int64_t tpm_answer;
    bool tpm_stores;
    unsigned tpm_calls;
    uint64_t tpm_saw;
    uint32_t stores;
} machine;

static int64_t tpm_execute(const uint8_t *command, uint32_t size, uint8_t *response)
{
    CHECK(size >= 1 && size <= MAILBOX_MAX_PAYLOAD_BYTES, "a command has 1 to 4096 bytes");
    machine.tpm_calls++;
    machine.tpm_saw = fingerprint(command, size);
    machine.stores += machine.tpm_stores;
    if (machine.tpm_answer > 0)
        memset(response, 0xA5, (size_t)machine.tpm_answer);
    return machine.tpm_answer;
}

static void store_u32(uint32_t offset, uint32_t value)
{
    value = htole32(value);
    memcpy(machine.interface->memory + offset, &value, sizeof value);
}

static uint32_t load_u32(const uint8_t *memory, uint32_t offset)
{
    uint32_t value;

    memcpy(&value, memory + offset, sizeof value);
    return le32toh(value);
}

/* Registers and attach page as publish_power_on() of direct.py leaves them, as far as direct.h reads them. */
static void power_on(struct program *program)
{
    struct direct_interface *interface = machine.interface;

    if (interface->has_session)
        mailbox_session_close(&interface->session);
    memset((uint8_t *)interface + offsetof(struct direct_interface, device), 0,
           sizeof *interface - offsetof(struct direct_interface, device));
    memset(interface->memory, 0, CRB_COMMAND_ADDRESS);
    memset(interface->boot_key, (int)take(program, 1), MAILBOX_KEY_BYTES);
    CHECK(direct_fresh_nonce(interface), "there is randomness");
    memcpy(interface->memory + CRB_ATTACH_NONCE_OFFSET, interface->sp_nonce, MAILBOX_NONCE_BYTES);
    store_u32(CRB_CTRL_CMD_SIZE, CRB_COMMAND_BYTES);
    store_u32(CRB_CTRL_CMD_LADDR, CRB_COMMAND_ADDRESS);
    store_u32(CRB_CTRL_RSP_SIZE, MAILBOX_MAX_FRAME_BYTES);
    store_u32(CRB_CTRL_RSP_ADDR, CRB_RESPONSE_ADDRESS);
}

/* What parking and waking do to the interface: DirectInterface.snapshot() and a new one. */
static void park_and_wake(void)
{
    struct direct_interface *interface = machine.interface;
    uint8_t keys[2][MAILBOX_KEY_BYTES];
    uint8_t vm_nonce[MAILBOX_NONCE_BYTES];

    CHECK(interface->device.state != CRB_EXECUTION, "a command is over when it can be parked");
    if (!interface->has_session)
        return;
    memcpy(keys, interface->session.keys, sizeof keys);
    memcpy(vm_nonce, interface->session.vm_nonce, sizeof vm_nonce);
    mailbox_session_close(&interface->session);
    CHECK(mailbox_session_open(&interface->session, keys, vm_nonce), "a session opens again");
}

/* A client of the VM attaches: with the nonce that the memory offers now. */
static void attach(struct program *program)
{
    struct client *client = &machine.client[machine.clients % MAX_CLIENTS];
    uint8_t vm_nonce[MAILBOX_NONCE_BYTES];

    if (machine.clients >= MAX_CLIENTS)
        return;
    memset(vm_nonce, (int)take(program, 1), sizeof vm_nonce);
    memcpy(client->sp_nonce, machine.interface->memory + CRB_ATTACH_NONCE_OFFSET, MAILBOX_NONCE_BYTES);
    CHECK(mailbox_session_derive(&client->session, machine.interface->boot_key, client->sp_nonce, vm_nonce),
          "a session opens");
    client->sequence = 0;
    machine.clients++;
}

static uint64_t frame_address(struct program *program)
{
    static const uint64_t fitting[] = {CRB_COMMAND_ADDRESS, CRB_COMMAND_ADDRESS, CRB_DATA_BUFFER, 0x6000, 0x2001,
                                       CRB_RESPONSE_ADDRESS};
    static const uint64_t borders[] = {0, 0x4c, 0x7c, 0xf80, 0xfb0, 0x1000, 0x1ffc, 0x6fb0, 0x7f00, 0x7fb0, 0x7ffc};
    uint8_t which = (uint8_t)take(program, 1);

    if (which < 176)
        return fitting[which % 6];
    return which < 224 ? borders[which % 11] : take(program, which < 248 ? 2 : 8);
}

/* Lays a frame (or part of one) into the memory, and points the registers there. */
static void place(struct program *program, const uint8_t *frame, uint32_t size, uint64_t address)
{
    uint8_t how = (uint8_t)take(program, 1);
    uint32_t room = how < 128 ? MAILBOX_MAX_FRAME_BYTES : how < 224 ? size : (uint32_t)take(program, how < 248 ? 2 : 4);

    if (address < CRB_MEMORY_BYTES) {
        size = size <= CRB_MEMORY_BYTES - address ? size : (uint32_t)(CRB_MEMORY_BYTES - address);
        memcpy(machine.interface->memory + address, frame, size);
    }
    store_u32(CRB_CTRL_CMD_LADDR, (uint32_t)address);
    store_u32(CRB_CTRL_CMD_HADDR, (uint32_t)(address >> 32));
    store_u32(CRB_CTRL_CMD_SIZE, room);
}

static uint32_t payload_of(struct program *program, uint8_t payload[MAILBOX_MAX_PAYLOAD_BYTES])
{
    uint8_t shape = (uint8_t)take(program, 1);
    uint32_t size = shape < 128 ? 10 + shape % 64 : 1 + (uint32_t)take(program, 2) % MAILBOX_MAX_PAYLOAD_BYTES;

    memset(payload, 0, size);
    take_bytes(program, payload, size < 16 ? size : 16);
    if (shape % 8 == 0 && size >= 10)
        memcpy(payload + 6, "\x00\x00\x01\x31", 4); /* TPM2_CreatePrimary can run long */
    return size;
}

/* A genuine frame of a client; it may then be damaged, or lie elsewhere than where it was made for. */
static void seal(struct program *program)
{
    uint8_t payload[MAILBOX_MAX_PAYLOAD_BYTES];
    struct sealed *sealed = &machine.sealed[machine.sealed_count];
    struct client *client;
    uint8_t how;
    uint32_t size;

    if (machine.clients == 0)
        attach(program);
    if (machine.sealed_count == MAX_SEALED)
        return;
    sealed->client = (unsigned)take(program, 1) % machine.clients;
    client = &machine.client[sealed->client];
    how = (uint8_t)take(program, 1);
    sealed->sequence = how < 200 ? client->sequence + 1 : how < 230 ? take(program, 1) : take(program, 8);
    if (sealed->sequence == 0 || sealed->sequence > MAILBOX_MAX_SEQUENCE)
        sealed->sequence = 1;
    client->sequence = sealed->sequence;
    sealed->address = frame_address(program);
    size = payload_of(program, payload);
    if (how % 8 == 5) /* to the memory's last byte */
        sealed->address = CRB_MEMORY_BYTES - MAILBOX_OVERHEAD_BYTES - size;
    CHECK(mailbox_seal(&client->session, MAILBOX_COMMAND, sealed->sequence, sealed->address, payload, size, sealed->frame)
              == MAILBOX_OK,
          "the VM can seal");
    sealed->frame_bytes = MAILBOX_OVERHEAD_BYTES + size;
    sealed->fingerprint = fingerprint(payload, size);
    machine.sealed_count++;
    place(program, sealed->frame, sealed->frame_bytes, sealed->address);
    if (how % 4 == 0) {
        uint32_t at = (uint32_t)sealed->address + (uint32_t)take(program, 2) % (how % 8 == 0 ? sealed->frame_bytes : 16);

        if (at < CRB_MEMORY_BYTES)
            machine.interface->memory[at] ^= (uint8_t)take(program, 1);
    }
}

static void replay(struct program *program)
{
    struct sealed *sealed;

    if (machine.sealed_count == 0)
        return;
    sealed = &machine.sealed[take(program, 1) % machine.sealed_count];
    place(program, sealed->frame, sealed->frame_bytes, take(program, 1) < 192 ? sealed->address : frame_address(program));
}

/* What was executed had been sealed by a client of this session, for this sequence and, if that is known, for this place; and
   it was executed once. */
static void check_executed(uint64_t saw, const uint64_t *address)
{
    const struct direct_interface *interface = machine.interface;
    const uint8_t *key = interface->session.keys[0];
    bool genuine = false;

    CHECK(interface->has_session, "a command is executed in a session");
    for (unsigned at = 0; at < machine.sealed_count && !genuine; at++) {
        const struct sealed *sealed = &machine.sealed[at];

        genuine = sealed->sequence == interface->sequence && sealed->fingerprint == saw
                  && (address == NULL || sealed->address == *address)
                  && memcmp(machine.client[sealed->client].session.keys[0], key, MAILBOX_KEY_BYTES) == 0;
    }
    CHECK(genuine, "what is executed was sealed by the VM, in this session, with this sequence");
    for (unsigned at = 0; at < machine.executed_count; at++)
        CHECK(machine.executed[at].sequence != interface->sequence
                  || memcmp(machine.executed[at].key, key, MAILBOX_KEY_BYTES) != 0,
              "no sequence of a session is executed twice");
    if (machine.executed_count == MAX_EXECUTED)
        return;
    memcpy(machine.executed[machine.executed_count].key, key, MAILBOX_KEY_BYTES);
    machine.executed[machine.executed_count++].sequence = interface->sequence;
}

static void forgive(uint32_t offset, uint32_t size)
{
    memcpy(machine.before + offset, machine.interface->memory + offset, size);
}

/* Takes from `before` what the SP may write. The rest has to be as it was. */
static void check_memory(bool new_session, uint32_t answered)
{
    static const uint32_t registers[] = {CRB_LOC_STATE, CRB_LOC_CTRL,    CRB_LOC_STS,    CRB_CTRL_REQ,
                                         CRB_CTRL_STS,  CRB_CTRL_CANCEL, CRB_CTRL_START, CRB_ATTACH_ERROR_OFFSET};
    uint32_t room = load_u32(machine.before, CRB_CTRL_RSP_SIZE);
    uint64_t address = (uint64_t)load_u32(machine.before, CRB_CTRL_RSP_ADDR + 4) << 32
                       | load_u32(machine.before, CRB_CTRL_RSP_ADDR);

    for (unsigned at = 0; at < sizeof registers / sizeof *registers; at++)
        forgive(registers[at], 4);
    if (new_session)
        forgive(CRB_ATTACH_NONCE_OFFSET, MAILBOX_NONCE_BYTES);
    if (answered > 0) {
        uint32_t size = MAILBOX_OVERHEAD_BYTES + answered;

        CHECK(size <= room && address >= CRB_DATA_BUFFER && address <= CRB_MEMORY_BYTES - size
                  && (address >= CRB_COMMAND_ADDRESS || address + size <= CRB_ATTACH_ERROR_OFFSET - 12),
              "a response lies in its room, beside registers and attach page");
        forgive((uint32_t)address, size);
    }
    CHECK(memcmp(machine.before, machine.interface->memory, CRB_MEMORY_BYTES) == 0,
          "nothing is written but registers of the SP and the response");
}

static void check_response(uint32_t size, uint8_t first)
{
    struct direct_interface *interface = machine.interface;
    uint8_t payload[MAILBOX_MAX_PAYLOAD_BYTES];
    struct mailbox_header header;
    const uint8_t *frame = interface->memory + interface->response_address;

    CHECK(mailbox_parse(frame, MAILBOX_OVERHEAD_BYTES + size, MAILBOX_RESPONSE, &header) == MAILBOX_OK
              && header.payload_bytes == size && header.sequence == interface->sequence,
          "a response has the sequence of its command");
    CHECK(mailbox_open(&interface->session, MAILBOX_RESPONSE, &header, interface->response_address, frame, payload)
                  == MAILBOX_OK
              && payload[0] == first && payload[size - 1] == first,
          "a response opens to what the TPM answered");
}

/* Ends a command that was handed out. */
static void end_command(struct program *program, enum direct_event event)
{
    struct direct_interface *interface = machine.interface;
    uint8_t how = (uint8_t)take(program, 1);

    if (event == DIRECT_FAILED || how < 64)
        direct_refuse(interface, how % 2 ? ATTACH_STORAGE : ATTACH_TPM_FAILED);
    else if (event == DIRECT_STORED)
        direct_answer(interface, interface->response_size);
    else {
        memset(interface->response, 0xA5, sizeof interface->response);
        direct_answer(interface, how < 80 ? (uint32_t)take(program, 4) : 1 + (uint32_t)take(program, 2) % 4096);
    }
}

static void serve(struct program *program)
{
    struct direct_interface *interface = machine.interface;
    uint64_t executed = interface->executed;
    uint8_t how = (uint8_t)take(program, 1);
    uint8_t nonce[MAILBOX_NONCE_BYTES];
    enum direct_event event;
    uint64_t address;
    bool answered;

    memcpy(machine.before, interface->memory, CRB_MEMORY_BYTES);
    address = (uint64_t)load_u32(machine.before, CRB_CTRL_CMD_HADDR) << 32 | load_u32(machine.before, CRB_CTRL_CMD_LADDR);
    memcpy(nonce, interface->sp_nonce, sizeof nonce);
    machine.tpm_answer = how < 200 ? 1 + (int64_t)take(program, 2) % 4096 : -(int64_t)(how & 1);
    machine.tpm_stores = how % 8 == 1;
    machine.tpm_calls = 0;
    event = how % 2 ? direct_serve(interface, machine.control, how % 16 == 3) : direct_service(interface, how % 16 == 4);
    if (event == DIRECT_COMMAND)
        machine.tpm_saw = fingerprint(interface->command, interface->command_size);
    if (event == DIRECT_COMMAND || event == DIRECT_STORED || event == DIRECT_FAILED)
        end_command(program, event);
    CHECK(interface->device.state != CRB_EXECUTION, "no command is under way");
    CHECK(interface->executed - executed == (event == DIRECT_COMMAND ? 1 : machine.tpm_calls), "each command is counted");
    CHECK(interface->executed - executed <= 1, "one start is one command");
    if (interface->executed > executed)
        check_executed(machine.tpm_saw, &address);
    answered = interface->executed > executed && interface->device.error == ATTACH_NONE;
    if (answered) {
        struct mailbox_header header;

        CHECK(mailbox_parse(interface->memory + interface->response_address, interface->response_room, MAILBOX_RESPONSE,
                            &header)
                  == MAILBOX_OK,
              "an answer is a frame");
        check_response(header.payload_bytes, 0xA5);
        check_memory(memcmp(nonce, interface->sp_nonce, sizeof nonce) != 0, header.payload_bytes);
    } else
        check_memory(memcmp(nonce, interface->sp_nonce, sizeof nonce) != 0, 0);
}

/* Serves, many times, while the scribbler writes: registers, and header and first words of the frame. */
static void serve_scribbled(struct program *program)
{
    static const uint32_t registers[] = {CRB_CTRL_CMD_SIZE, CRB_CTRL_CMD_LADDR, CRB_CTRL_CMD_HADDR, CRB_CTRL_RSP_SIZE,
                                         CRB_CTRL_RSP_ADDR, CRB_CTRL_CANCEL};
    struct direct_interface *interface = machine.interface;
    uint32_t frame = load_u32(interface->memory, CRB_CTRL_CMD_LADDR) & ~3u;
    struct scribbler scribbler = {
        .memory = interface->memory, .randomness = 1 + take(program, 4), .favourite = (unsigned)take(program, 1)};

    for (unsigned at = 0; at < sizeof registers / sizeof *registers; at++)
        scribble_at(&scribbler, registers[at]);
    if (frame <= CRB_MEMORY_BYTES - MAILBOX_HEADER_BYTES - 16)
        for (uint32_t at = 4; at < MAILBOX_HEADER_BYTES + 16; at += at < 24 ? 4 : 16)
            scribble_at(&scribbler, frame + at);
    scribbler_start(&scribbler);
    for (unsigned round = 64 + (unsigned)take(program, 1); round > 0; round--) {
        uint64_t executed = interface->executed;
        enum direct_event event;

        machine.tpm_answer = 1 + (int64_t)(round * 97 % 4096);
        shared_store(interface->memory, CRB_LOC_CTRL, LOC_CTRL_REQUEST_ACCESS);
        shared_store(interface->memory, CRB_CTRL_REQ, CTRL_REQ_CMD_READY);
        shared_store(interface->memory, CRB_CTRL_START, 1);
        event = direct_service(interface, round % 5 == 0);
        if (event == DIRECT_COMMAND)
            machine.tpm_saw = fingerprint(interface->command, interface->command_size);
        if (event == DIRECT_COMMAND || event == DIRECT_STORED || event == DIRECT_FAILED)
            direct_answer(interface, 1 + round * 61 % 4096);
        CHECK(interface->executed - executed <= 1, "one start is one command");
        if (interface->executed > executed)
            check_executed(machine.tpm_saw, NULL);
    }
    scribbler_stop(&scribbler);
}

static void write_register(struct program *program)
{
    static const uint32_t values[] = {0, 1, 2, 3, 4, 8, 80, 4176, 0x2000, 0x4000, 0x7fff, 0x8000, 0x80000000, 0xffffffff};
    uint32_t offset = ((uint32_t)take(program, 1) * 4) % CRB_DATA_BUFFER;
    uint8_t which = (uint8_t)take(program, 1);

    store_u32(offset, which < 224 ? values[which % 14] : (uint32_t)take(program, 4));
}

static void write_memory(struct program *program)
{
    uint32_t offset = (uint32_t)take(program, 2) % CRB_MEMORY_BYTES;
    uint32_t size = (uint32_t)take(program, 1);

    take_bytes(program, machine.interface->memory + offset,
               size < CRB_MEMORY_BYTES - offset ? size : CRB_MEMORY_BYTES - offset);
}

static void start(void)
{
    store_u32(CRB_LOC_CTRL, LOC_CTRL_REQUEST_ACCESS);
    store_u32(CRB_CTRL_REQ, CTRL_REQ_CMD_READY);
    store_u32(CRB_CTRL_START, 1);
}

static void run(struct program *program)
{
    if (fuzz_scribble) {
        seal(program);
        serve_scribbled(program);
    }
    while (program->at < program->end) {
        switch (take(program, 1) % 13) {
        case 0: write_register(program); break;
        case 1: write_memory(program); break;
        case 2: attach(program); break;
        case 3: seal(program); break;
        case 4: replay(program); break;
        case 5: start(); break;
        case 6: serve(program); break;
        case 7: park_and_wake(); break;
        case 8: store_u32(CRB_CTRL_RSP_ADDR, (uint32_t)frame_address(program)); break;
        case 9: store_u32(CRB_CTRL_RSP_SIZE, (uint32_t)take(program, 2)); break;
        case 10: /* an ordinary command, from end to end */
            seal(program);
            start();
            serve(program);
            break;
        case 11:
            replay(program);
            start();
            serve(program);
            break;
        case 12:
            if (take(program, 1) == 0)
                power_on(program);
            break;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct program program = {data, data + size};
    struct direct_interface *interface = calloc(1, sizeof *interface);

    fuzz_begin();
    memset(&machine, 0, sizeof machine);
    machine.interface = interface;
    interface->memory = calloc(1, CRB_MEMORY_BYTES);
    machine.before = malloc(CRB_MEMORY_BYTES);
    interface->sp_doorbell = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
    interface->vm_doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    machine.control = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
    interface->execute = tpm_execute;
    interface->stores = &machine.stores;
    power_on(&program);
    run(&program);
    for (unsigned at = 0; at < machine.clients; at++)
        mailbox_session_close(&machine.client[at].session);
    if (interface->has_session)
        mailbox_session_close(&interface->session);
    close(machine.control);
    close(interface->vm_doorbell);
    close(interface->sp_doorbell);
    free(machine.before);
    free(interface->memory);
    free(interface);
    return 0;
}
