/* What a kernel is, and what it may use: freestanding C, no globals but constants, memory from `room`. */
typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned char u8;

#define NOINLINE __attribute__((noinline))

struct place {
    void (*put)(char);   /* one character of the report */
    u64 (*ticks)(void);  /* time in units of 100 ns */
    u8 *room;            /* 48 MB, zero at the start */
};

struct kernel {
    const char *group, *name;
    u64 (*run)(struct place *); /* one round of work; the result does not depend on the machine */
};

/* Runs every kernel of a group for `budget` ticks and reports "name best first rounds result" a line. */
void run_group(struct place *place, const char *group, u64 budget);
