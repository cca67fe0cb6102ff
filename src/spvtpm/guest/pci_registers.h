/* The registers of a PCI device, through the file that Linux has of them. */

#ifndef SPVTPM_PCI_REGISTERS_H
#define SPVTPM_PCI_REGISTERS_H

#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#include <sys/mman.h>

/* Maps the page in which the registers of a PCI device begin; NULL if that is refused. */
static uint8_t *registers_map(int device)
{
    void *page = mmap(NULL, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE, MAP_SHARED, device, 0);

    return page != MAP_FAILED ? page : NULL;
}

static void registers_unmap(uint8_t *page)
{
    munmap(page, (size_t)sysconf(_SC_PAGESIZE));
}

#endif
