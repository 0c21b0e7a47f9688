/* Work for an operating system: what a process costs Linux, in the guest, under QEMU and on the host.
 *
 *   linux BUDGET NAME...     measure these, BUDGET ticks each: lines of "name best first rounds result", in ticks of 100 ns
 *
 * A program without libc, so that the same file runs in any image. Names: see the table at the end. "workers-N" is a fixed
 * amount of work by N processes at once. Read by bench/linux.py.
 */

typedef unsigned long u64;
typedef unsigned int u32;

#if defined(__riscv)
enum { PIPE2 = 59, READ = 63, WRITE = 64, EXIT = 93, CLOCK_GETTIME = 113, GETPPID = 173, CLONE = 220, EXECVE = 221, MMAP = 222,
       MUNMAP = 215, WAIT4 = 260, CLOSE = 57, KILL = 129 };

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long a0 asm("a0") = a, a1 asm("a1") = b, a2 asm("a2") = c, a3 asm("a3") = d, a4 asm("a4") = e, a5 asm("a5") = f;
    register long a7 asm("a7") = number;
    asm volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a3), "r"(a4), "r"(a5), "r"(a7) : "memory");
    return a0;
}

asm(".globl _start\n_start:\n mv a0, sp\n andi sp, sp, -16\n j begin\n");
#else
enum { PIPE2 = 293, READ = 0, WRITE = 1, EXIT = 60, CLOCK_GETTIME = 228, GETPPID = 110, CLONE = 56, EXECVE = 59, MMAP = 9,
       MUNMAP = 11, WAIT4 = 61, CLOSE = 3, KILL = 62 };

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
    long result;
    asm volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    return result;
}

asm(".globl _start\n_start:\n mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");
#endif

#define call0(n) call(n, 0, 0, 0, 0, 0, 0)
#define call1(n, a) call(n, (long)(a), 0, 0, 0, 0, 0)
#define call3(n, a, b, c) call(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define call4(n, a, b, c, d) call(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

enum { PAGE = 4096, SIGCHLD = 17, PAGES = 2048, MAX_WORKERS = 16 };

static void fail(const char *what)
{
    u32 length = 0;
    while (what[length])
        length++;
    call3(WRITE, 2, what, length);
    call3(WRITE, 2, " failed\n", 8);
    call1(EXIT, 1);
}

static u64 ticks(void)
{
    u64 time[2];
    call3(CLOCK_GETTIME, 1, time, 0);
    return time[0] * 10000000 + time[1] / 100;
}

static long fork_(void)
{
    long pid = call(CLONE, SIGCHLD, 0, 0, 0, 0, 0);
    if (pid < 0)
        fail("fork");
    return pid;
}

static u32 wait_for(long pid)
{
    u32 status = 0;
    if (call4(WAIT4, pid, &status, 0, 0) != pid)
        fail("wait4");
    return status >> 8;
}

static char *map(u64 size)
{
    long at = call(MMAP, 0, (long)size, 3, 0x22, -1, 0);
    if (at < 0 && at > -4096)
        fail("mmap");
    return (char *)at;
}

static const char *self;

/* Each returns a number that must be the same everywhere, and does its thing `count` times. */

static u64 system_calls(u64 count)
{
    u64 sum = 0;
    for (u64 i = 0; i < count; i++)
        sum += call0(GETPPID) >= 0;
    return sum == count;
}

static u64 forks(u64 count)
{
    u64 sum = 0;
    for (u64 i = 0; i < count; i++) {
        long pid = fork_();
        if (!pid)
            call1(EXIT, 7);
        sum += wait_for(pid);
    }
    return sum / count;
}

static u64 fork_execs(u64 count)
{
    u64 sum = 0;
    const char *arguments[] = {self, 0};
    for (u64 i = 0; i < count; i++) {
        long pid = fork_();
        if (!pid) {
            call3(EXECVE, self, arguments, 0);
            call1(EXIT, 1);
        }
        sum += wait_for(pid);
    }
    return sum / count;
}

static u64 page_faults(u64 count)
{
    u64 sum = 0;
    for (u64 i = 0; i < count; i++) {
        char *at = map(PAGES * PAGE);
        for (u32 page = 0; page < PAGES; page++)
            sum += ++at[page * PAGE];
        call3(MUNMAP, at, PAGES * PAGE, 0);
    }
    return sum / count;
}

static u64 mappings(u64 count)
{
    u64 sum = 0;
    for (u64 i = 0; i < count; i++) {
        char *at = map(16 * PAGE);
        sum += ++at[0];
        call3(MUNMAP, at, 16 * PAGE, 0);
    }
    return sum / count;
}

static u64 pipe_switches(u64 count)
{
    int there[2], back[2];
    u32 word = 0;
    if (call3(PIPE2, there, 0, 0) < 0 || call3(PIPE2, back, 0, 0) < 0)
        fail("pipe2");
    long pid = fork_();
    if (!pid) {
        call1(CLOSE, there[1]);
        while (call3(READ, there[0], &word, 4) == 4) {
            word++;
            call3(WRITE, back[1], &word, 4);
        }
        call1(EXIT, 0);
    }
    for (u64 i = 0; i < count; i++)
        if (call3(WRITE, there[1], &word, 4) != 4 || call3(READ, back[0], &word, 4) != 4)
            fail("pipe");
    for (int i = 0; i < 2; i++) {
        call1(CLOSE, there[i]);
        call1(CLOSE, back[i]);
    }
    wait_for(pid);
    return word == count;
}

static u32 work(u32 seed)
{
    static u32 table[1 << 14];
    u32 x = seed | 1, sum = 0;
    for (u32 round = 0; round < 96; round++)
        for (u32 i = 0; i < 1 << 14; i++) {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            table[x & ((1 << 14) - 1)] += x;
            sum = sum * 31 + table[i];
        }
    return sum;
}

static u64 workers(u64 count, u32 number)
{
    u64 sum = 0;
    long pids[MAX_WORKERS];
    for (u64 i = 0; i < count; i++) {
        for (u32 worker = 0; worker < number; worker++) {
            pids[worker] = fork_();
            if (!pids[worker])
                call1(EXIT, (work(worker) & 63) + 1);
        }
        for (u32 worker = 0; worker < number; worker++)
            sum += wait_for(pids[worker]);
    }
    return sum / count;
}

static u64 workers_2(u64 count) { return workers(count, 2); }
static u64 workers_4(u64 count) { return workers(count, 4); }

/* `inner`: how often it is done in a round that is timed, and `each` how many of the thing that is. */
static const struct { const char *name; u64 (*run)(u64); u32 inner, each; } table[] = {
    {"system-call", system_calls, 1000, 1000},
    {"fork", forks, 8, 8},
    {"fork-exec", fork_execs, 8, 8},
    {"page-fault", page_faults, 1, PAGES},
    {"mmap-munmap", mappings, 200, 200},
    {"pipe-switch", pipe_switches, 200, 400},
    {"workers-2", workers_2, 1, 1},
    {"workers-4", workers_4, 1, 1},
};

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static char *decimal(char *to, u64 value)
{
    char digits[24];
    u32 length = 0;
    do
        digits[length++] = '0' + value % 10;
    while (value /= 10);
    while (length)
        *to++ = digits[--length];
    return to;
}

/* Nanoseconds of one thing, so that the quickest do not round to nothing. */
static void measure(u32 index, u64 budget)
{
    u64 best = ~0UL, first = 0, rounds = 0, result = 0, end = ticks() + budget;
    do {
        u64 start = ticks();
        result = table[index].run(table[index].inner);
        u64 took = ticks() - start;
        first = rounds++ ? first : took;
        best = took < best ? took : best;
    } while (ticks() < end);
    char line[160], *to = line;
    for (const char *from = table[index].name; *from;)
        *to++ = *from++;
    u64 numbers[] = {best * 100 / table[index].each, first * 100 / table[index].each, rounds, result};
    for (u32 i = 0; i < 4; i++) {
        *to++ = ' ';
        to = decimal(to, numbers[i]);
    }
    *to++ = '\n';
    call3(WRITE, 1, line, to - line);
}

__attribute__((used)) void begin(u64 *stack)
{
    const char **arguments = (const char **)(stack + 1);
    u64 count = stack[0], budget = 0;
    if (count < 2)
        call1(EXIT, 9); /* what fork_execs starts */
    self = arguments[0];
    for (const char *digit = arguments[1]; *digit; digit++)
        budget = budget * 10 + (*digit - '0');
    for (u64 argument = 2; argument < count; argument++)
        for (u32 index = 0; index < sizeof table / sizeof *table; index++)
            if (same(arguments[argument], table[index].name))
                measure(index, budget);
    call1(EXIT, 0);
}
