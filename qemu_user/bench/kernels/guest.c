/* The guest's end of the report and of time. */
#include "kernels.h"

static void put(char c)
{
    volatile u8 *uart = (volatile u8 *)0x10000000;
    while (!(uart[5] & 0x20)) ;
    uart[0] = c;
}

static u64 ticks(void)
{
    u64 t;
    __asm__ volatile("rdtime %0" : "=r"(t));
    return t;
}

void *memcpy(void *to, const void *from, u64 n)
{
    u8 *a = to;
    const u8 *b = from;
    while (n--) *a++ = *b++;
    return to;
}

void *memset(void *to, int c, u64 n)
{
    u8 *a = to;
    while (n--) *a++ = c;
    return to;
}

void guest_main(u64 group, u64 budget)
{
    struct place place = {put, ticks, (u8 *)0x84000000};
    run_group(&place, group == 0 ? "cpu" : group == 1 ? "fp" : "mmu", budget);
}
