/* A Linux program for guests that are moved while they run: what a migration does to them, seen from inside. No libc.

   probe sample DISK BLOCK looks at the clock every 0.2 ms; writes the longest gap between two looks of each half second, in
                           ticks, with a running number, to block BLOCK (4 KiB) of DISK
   probe dirty MIB RATE    writes to pages of MIB, RATE MB (pages times 4 KiB) a second
   probe check MIB         counts in every page of MIB, round after round; ends with status 1 when a page has another count
*/
typedef unsigned long u64;
#define PAGE 4096UL
#define TICKS 10000000UL /* of the time CSR in a second */

static long call(long number, long a, long b, long c, long d)
{
    register long a0 __asm__("a0") = a, a1 __asm__("a1") = b, a2 __asm__("a2") = c, a3 __asm__("a3") = d;
    register long a4 __asm__("a4") = -1, a5 __asm__("a5") = 0, a7 __asm__("a7") = number;
    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a3), "r"(a4), "r"(a5), "r"(a7) : "memory");
    return a0;
}

enum { OPENAT = 56, PWRITE = 68, EXIT = 93, NANOSLEEP = 101, MMAP = 222 };

static u64 now(void)
{
    u64 ticks;
    __asm__ volatile("rdtime %0" : "=r"(ticks));
    return ticks;
}

static u64 number(const char *text)
{
    u64 value = 0;
    for (; *text; text++) value = 10 * value + (u64)(*text - '0');
    return value;
}

static void doze(u64 nanoseconds)
{
    u64 span[2] = {0, nanoseconds};
    call(NANOSLEEP, (long)span, 0, 0, 0);
}

static char *memory(u64 bytes)
{
    return (char *)call(MMAP, 0, (long)bytes, 3, 0x22);
}

static void sample(const char *path, u64 block)
{
    u64 *report = (u64 *)memory(PAGE);
    long disk = call(OPENAT, -100, (long)path, 0x101001 | 040000, 0); /* O_WRONLY | O_SYNC | O_DIRECT */
    for (;;) {
        u64 begin = now(), last = begin, longest = 0;
        while (last - begin < TICKS / 2) {
            doze(200000);
            u64 time = now();
            if (time - last > longest) longest = time - last;
            last = time;
        }
        report[0]++;
        report[1] = longest;
        call(PWRITE, disk, (long)report, PAGE, (long)(block * PAGE));
    }
}

static void dirty(u64 bytes, u64 rate)
{
    char *start = memory(bytes);
    u64 pages = bytes / PAGE, at = 0, done = 0, begin = now();
    for (;;) {
        for (int count = 0; count < 64; count++) {
            *(volatile u64 *)(start + at * PAGE) = done++;
            if (++at == pages) at = 0;
        }
        while (done * PAGE > rate * 1000000 / 1000 * ((now() - begin) / (TICKS / 1000) + 1)) doze(500000);
        if (now() - begin > TICKS) { /* what was missed is not made up for */
            begin = now();
            done = 0;
        }
    }
}

static int check(u64 bytes)
{
    char *start = memory(bytes);
    for (u64 round = 0;; round++) {
        for (u64 at = 0; at < bytes; at += PAGE) {
            volatile u64 *first = (u64 *)(start + at), *other = (u64 *)(start + at + 2040);
            if (*first != round || *other != round) return 1;
            *first = *other = round + 1;
        }
        doze(5000000);
    }
}

__attribute__((used)) void begin(u64 *stack)
{
    char **words = (char **)(stack + 1);
    int status = 2;
    if (stack[0] == 4 && words[1][0] == 's') sample(words[2], number(words[3]));
    if (stack[0] == 4 && words[1][0] == 'd') dirty(number(words[2]) << 20, number(words[3]));
    if (stack[0] == 3 && words[1][0] == 'c') status = check(number(words[2]) << 20);
    call(EXIT, status, 0, 0, 0);
}

__asm__(".globl _start\n_start: mv a0, sp\n call begin\n");
