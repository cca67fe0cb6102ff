/* libFuzzer on driver.h: the guest's driver over memory whose owner writes what it likes, but has no key.

   The input is a program: the owner writes memory, lays down responses that the SP sealed (for this command or another one,
   damaged or not), lets the driver look, or has it send the next command. A response that comes out was sealed by the SP for
   this very command. The driver writes its command's frame and three registers, nothing else.

   --scribble: a second thread writes the memory while the driver sends and takes. */

#include "program.h"

#include "driver.h"

#define MAX_SEALED 48

static struct machine {
    struct crb_driver driver;
    struct mailbox_session session; /* the driver's */
    struct mailbox_session sp;      /* the same keys at the other end */
    struct mailbox_session foreign; /* other keys */
    uint8_t *before;
    unsigned sealed_count;
    struct {
        uint64_t sequence;
        uint64_t fingerprint;
    } sealed[MAX_SEALED];
} machine;

static const uint32_t answered_at[] = {CRB_CTRL_START, CRB_CTRL_STS};

static void check_result(int result)
{
    const struct crb_driver *driver = &machine.driver;
    bool genuine = false;

    if (result <= 0) {
        CHECK(result >= DRIVER_FRAME, "a result is one of those named");
        CHECK(result != DRIVER_FRAME || driver->frame_error != MAILBOX_OK, "a frame that is refused is refused for a reason");
        return;
    }
    CHECK(result <= MAILBOX_MAX_PAYLOAD_BYTES, "a response has 1 to 4096 bytes");
    for (unsigned at = 0; at < machine.sealed_count && !genuine; at++)
        genuine = machine.sealed[at].sequence == driver->sequence
                  && machine.sealed[at].fingerprint == fingerprint(driver->response, (size_t)result);
    CHECK(genuine, "a response was sealed by the SP for this very command");
}

static void seal_response(struct program *program)
{
    uint8_t payload[MAILBOX_MAX_PAYLOAD_BYTES];
    uint8_t frame[MAILBOX_MAX_FRAME_BYTES];
    uint8_t how = (uint8_t)take(program, 1);
    uint32_t size = how < 128 ? 10 + how % 32 : 1 + (uint32_t)take(program, 2) % MAILBOX_MAX_PAYLOAD_BYTES;
    uint64_t sequence = how % 4 != 3 ? machine.driver.sequence : take(program, how % 8 == 3 ? 1 : 8);
    uint64_t address = how % 16 != 5 ? CRB_RESPONSE_ADDRESS : take(program, 2);
    bool is_sp = how % 16 != 9;

    if (machine.sealed_count == MAX_SEALED || sequence == 0 || sequence > MAILBOX_MAX_SEQUENCE)
        return;
    memset(payload, 0, size);
    take_bytes(program, payload, size < 16 ? size : 16);
    CHECK(mailbox_seal(is_sp ? &machine.sp : &machine.foreign, MAILBOX_RESPONSE, sequence, address, payload, size, frame)
              == MAILBOX_OK,
          "the SP can seal");
    if (is_sp && address == CRB_RESPONSE_ADDRESS) {
        machine.sealed[machine.sealed_count].sequence = sequence;
        machine.sealed[machine.sealed_count++].fingerprint = fingerprint(payload, size);
    }
    if (how % 8 == 6)
        frame[take(program, 2) % (MAILBOX_OVERHEAD_BYTES + size)] ^= (uint8_t)take(program, 1);
    memcpy(machine.driver.memory + CRB_RESPONSE_ADDRESS, frame, MAILBOX_OVERHEAD_BYTES + size);
}

static void write_memory(struct program *program)
{
    uint32_t offset = (uint32_t)take(program, 2) % CRB_MEMORY_BYTES;
    uint32_t size = (uint32_t)take(program, 1);

    take_bytes(program, machine.driver.memory + offset,
               size < CRB_MEMORY_BYTES - offset ? size : CRB_MEMORY_BYTES - offset);
}

static void write_header(struct program *program)
{
    uint32_t offset = CRB_RESPONSE_ADDRESS + (uint32_t)take(program, 1) % MAILBOX_OVERHEAD_BYTES;

    take_bytes(program, machine.driver.memory + offset, 1 + take(program, 1) % 8);
}

static void transmit(struct program *program)
{
    uint8_t command[MAILBOX_MAX_PAYLOAD_BYTES];
    uint8_t how = (uint8_t)take(program, 1);
    uint32_t size = how < 200 ? 10 + how % 32 : 1 + (uint32_t)take(program, 2) % MAILBOX_MAX_PAYLOAD_BYTES;
    uint8_t *memory = machine.driver.memory;
    uint8_t frame[MAILBOX_OVERHEAD_BYTES];

    memset(command, how, size);
    memcpy(machine.before, memory, CRB_MEMORY_BYTES);
    check_result(driver_transmit(&machine.driver, command, size));
    if (fuzz_scribble)
        return;
    memcpy(frame, memory + CRB_COMMAND_ADDRESS, sizeof frame);
    CHECK(memcmp(frame, mailbox_magic, 4) == 0, "the command's frame lies where it belongs");
    memcpy(machine.before + CRB_COMMAND_ADDRESS, memory + CRB_COMMAND_ADDRESS, MAILBOX_OVERHEAD_BYTES + size);
    memcpy(machine.before + CRB_CTRL_REQ, memory + CRB_CTRL_REQ, 4);
    memcpy(machine.before + CRB_CTRL_CANCEL, memory + CRB_CTRL_CANCEL, 8); /* and CTRL_START */
    CHECK(memcmp(machine.before, memory, CRB_MEMORY_BYTES) == 0, "a driver writes its command and its registers");
}

static void look(void)
{
    int result;

    memcpy(machine.before, machine.driver.memory, CRB_MEMORY_BYTES);
    result = driver_take(&machine.driver);
    check_result(result);
    CHECK(fuzz_scribble || memcmp(machine.before, machine.driver.memory, CRB_MEMORY_BYTES) == 0, "looking writes nothing");
}

static void run(struct program *program)
{
    while (program->at < program->end) {
        uint8_t operation = (uint8_t)take(program, 1);

        switch (operation % 8) {
        case 0: write_memory(program); break;
        case 1: write_header(program); break;
        case 2: seal_response(program); break;
        case 3: memset(machine.driver.memory + answered_at[operation / 8 % 2], operation >= 128, 4); break;
        case 4: look(); break;
        case 5: transmit(program); break;
        default: /* the SP answers, and the driver takes it */
            seal_response(program);
            memset(machine.driver.memory + CRB_CTRL_STS, 0, 4);
            memset(machine.driver.memory + CRB_CTRL_START, 0, 4);
            look();
        }
    }
}

/* The driver sends and takes while registers, header and first words of a genuine response change under it. */
static void run_scribbled(struct program *program)
{
    struct scribbler scribbler = {
        .memory = machine.driver.memory, .randomness = 1 + take(program, 4), .favourite = (unsigned)take(program, 1)};

    transmit(program);
    seal_response(program);
    memset(machine.driver.memory + CRB_CTRL_START, 0, 4);
    scribble_at(&scribbler, CRB_CTRL_START);
    scribble_at(&scribbler, CRB_CTRL_STS);
    for (uint32_t at = 0; at < MAILBOX_HEADER_BYTES + 32; at += at < 28 ? 4 : 16)
        scribble_at(&scribbler, CRB_RESPONSE_ADDRESS + at);
    scribbler_start(&scribbler);
    for (unsigned round = 64 + (unsigned)take(program, 1); round > 0; round--)
        check_result(driver_take(&machine.driver));
    transmit(program);
    scribbler_stop(&scribbler);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t key[MAILBOX_KEY_BYTES] = {1};
    static const uint8_t nonce[MAILBOX_NONCE_BYTES] = {2};
    static const uint8_t other_nonce[MAILBOX_NONCE_BYTES] = {3};
    struct program program = {data, data + size};
    struct crb_driver *driver = &machine.driver;

    fuzz_begin();
    memset(&machine, 0, sizeof machine);
    driver->memory = calloc(1, CRB_MEMORY_BYTES);
    machine.before = malloc(CRB_MEMORY_BYTES);
    driver->sp_doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    driver->session = &machine.session;
    CHECK(mailbox_session_derive(&machine.session, key, nonce, nonce)
              && mailbox_session_derive(&machine.sp, key, nonce, nonce)
              && mailbox_session_derive(&machine.foreign, key, other_nonce, nonce),
          "sessions open");
    if (fuzz_scribble)
        run_scribbled(&program);
    else
        run(&program);
    mailbox_session_close(&machine.session);
    mailbox_session_close(&machine.sp);
    mailbox_session_close(&machine.foreign);
    close(driver->sp_doorbell);
    free(machine.before);
    free(driver->memory);
    return 0;
}
