/* How both ends touch the memory that they share: registers, copies, doorbells. Everything in it may change at any moment. */

#ifndef SPVTPM_SHARED_MEMORY_H
#define SPVTPM_SHARED_MEMORY_H

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A 32-bit register; what was written before it by the other end is there. */
static uint32_t shared_load(const uint8_t *memory, uint32_t offset)
{
    return le32toh(__atomic_load_n((const uint32_t *)(memory + offset), __ATOMIC_ACQUIRE));
}

/* A 32-bit register; the other end finds what was written before it. */
static void shared_store(uint8_t *memory, uint32_t offset, uint32_t value)
{
    __atomic_store_n((uint32_t *)(memory + offset), htole32(value), __ATOMIC_RELEASE);
}

/* Copies memory out, once; the compiler may not come back for more. */
static void shared_copy(uint8_t *own, const uint8_t *shared, size_t size)
{
    memcpy(own, shared, size);
    __asm__ __volatile__("" ::: "memory");
}

/* Rings a doorbell. Whoever has let its counter fill up is awake. */
static void doorbell_ring(int doorbell)
{
    const uint64_t one = 1;

    while (write(doorbell, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* Takes the rings that wait, if any. */
static void doorbell_drain(int doorbell)
{
    uint64_t rings;

    while (read(doorbell, &rings, sizeof rings) < 0 && errno == EINTR)
        ;
}

/* Nanoseconds of a clock that only goes forward. */
static int64_t clock_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

#endif
