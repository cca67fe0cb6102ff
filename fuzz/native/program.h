/* What both harnesses share: their input read as a little program, a clock and randomness of their own, a scribbling thread.

   Include this before the code under test: it takes clock, scheduler and the kernel's randomness away from it, so that an
   input does the same every time (except with --scribble). */

#ifndef SPVTPM_FUZZ_PROGRAM_H
#define SPVTPM_FUZZ_PROGRAM_H

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/types.h>
#include <time.h>

#define CHECK(truth, sentence)                                                          \
    do {                                                                                \
        if (!(truth)) {                                                                 \
            fprintf(stderr, "%s:%d: invariant broken: %s\n", __FILE__, __LINE__, sentence); \
            abort();                                                                    \
        }                                                                               \
    } while (0)

struct program {
    const uint8_t *at;
    const uint8_t *end;
};

/* A number of `size` bytes, little-endian; zeros where the input has ended. */
static uint64_t take(struct program *program, unsigned size)
{
    uint64_t value = 0;

    for (unsigned byte = 0; byte < size && program->at < program->end; byte++)
        value |= (uint64_t)*program->at++ << 8 * byte;
    return value;
}

static size_t take_bytes(struct program *program, uint8_t *out, size_t size)
{
    size_t left = (size_t)(program->end - program->at);

    size = size < left ? size : left;
    memcpy(out, program->at, size);
    program->at += size;
    return size;
}

static uint64_t fingerprint(const uint8_t *content, size_t size)
{
    uint64_t hash = 0xcbf29ce484222325; /* FNV-1a */

    for (size_t at = 0; at < size; at++)
        hash = (hash ^ content[at]) * 0x100000001b3;
    return hash;
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint64_t fuzz_randomness;
static int64_t fuzz_now_ns;

static ssize_t fuzz_getrandom(void *out, size_t size, unsigned flags)
{
    (void)flags;
    for (size_t at = 0; at < size; at++)
        ((uint8_t *)out)[at] = (uint8_t)next_random(&fuzz_randomness);
    return (ssize_t)size;
}

/* Each look at the clock takes 20 µs: what spins for a while does not spin long. */
static int fuzz_clock_gettime(clockid_t clock, struct timespec *now)
{
    (void)clock;
    fuzz_now_ns += 20000;
    now->tv_sec = fuzz_now_ns / 1000000000;
    now->tv_nsec = fuzz_now_ns % 1000000000;
    return 0;
}

/* What it would wait for never comes: the input decides alone. */
static int fuzz_sched_yield(void)
{
    return 0;
}

static void fuzz_begin(void)
{
    fuzz_randomness = 0x9e3779b97f4a7c15;
    fuzz_now_ns = 1000000000;
}

/* The scribbler: another owner of the memory, who writes while the code under test reads. For a moment it gives a word another
   value, then the fitting one again: mostly all is as it should be, and a use that reads what was already checked once more
   can see something else. One word of each run has most of its attention. */

#define SCRIBBLED_WORDS 24

struct scribbler {
    uint8_t *memory;
    uint64_t randomness;
    unsigned words;
    unsigned favourite;
    uint32_t offsets[SCRIBBLED_WORDS];
    uint32_t fitting[SCRIBBLED_WORDS];
    bool writes;
    bool stop;
    pthread_t thread;
};

static bool fuzz_scribble; /* --scribble */

static void scribble_at(struct scribbler *scribbler, uint32_t offset)
{
    uint32_t fitting;

    if (scribbler->words == SCRIBBLED_WORDS)
        return;
    memcpy(&fitting, scribbler->memory + offset, sizeof fitting);
    scribbler->offsets[scribbler->words] = offset;
    scribbler->fitting[scribbler->words++] = fitting;
}

static void scribble_wait(unsigned rounds)
{
    while (rounds-- > 0)
        __asm__ __volatile__("" ::: "memory");
}

static void *scribble(void *argument)
{
    static const uint32_t unfitting[] = {0, 1, 79, 80, 81, 4096, 4097, 4176, 4177, 0x7ff0, 0x8000, 0x7fffffff, 0xffffffff};
    struct scribbler *scribbler = argument;

    __atomic_store_n(&scribbler->writes, true, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&scribbler->stop, __ATOMIC_ACQUIRE)) {
        uint64_t random = next_random(&scribbler->randomness);
        unsigned word = (unsigned)((random & 7) != 0 ? scribbler->favourite : random >> 3) % scribbler->words;
        uint32_t *place = (uint32_t *)(scribbler->memory + scribbler->offsets[word]);
        uint32_t value = unfitting[(random >> 16) % (sizeof unfitting / sizeof *unfitting)];

        if ((random >> 8 & 7) == 0)
            value = scribbler->fitting[word] ^ (uint32_t)(random >> 32);
        __atomic_store_n(place, value, __ATOMIC_RELAXED);
        scribble_wait(random >> 40 & 127);
        __atomic_store_n(place, scribbler->fitting[word], __ATOMIC_RELAXED);
        scribble_wait(random >> 48 & 511);
    }
    return NULL;
}

static void scribbler_start(struct scribbler *scribbler)
{
    CHECK(pthread_create(&scribbler->thread, NULL, scribble, scribbler) == 0, "the harness has a thread");
    while (!__atomic_load_n(&scribbler->writes, __ATOMIC_ACQUIRE))
        sched_yield();
}

static void scribbler_stop(struct scribbler *scribbler)
{
    __atomic_store_n(&scribbler->stop, true, __ATOMIC_RELEASE);
    pthread_join(scribbler->thread, NULL);
}

#define sched_yield fuzz_sched_yield
#define getrandom fuzz_getrandom
#define clock_gettime fuzz_clock_gettime

/* libFuzzer passes over arguments that begin with two dashes. */
int LLVMFuzzerInitialize(int *count, char ***arguments)
{
    for (int at = 1; at < *count; at++)
        fuzz_scribble |= strcmp((*arguments)[at], "--scribble") == 0;
    return 0;
}

#endif
