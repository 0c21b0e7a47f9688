/* Kernels that exist in the guest only: S-mode and its page tables (start.S has the trap handler). */

extern u64 call_user(u64 rounds);              /* U-mode ecalls, each answered in S-mode; how many there were */
extern u64 *page_table(void);                  /* root of the Sv39 tables; entry 8 on is free */
extern void set_fault_page(u64 *entry, u64 pte); /* what the trap handler puts there at the next page fault */

#define ROOM_VA 0x400000000ul /* a window of 4 KiB pages over room: root entry 16 */

static inline void sfence(void) { __asm__ volatile("sfence.vma" ::: "memory"); }

/* 16 MB of `room` once more, by 4 KiB pages, at ROOM_VA. */
static u64 *map_room(struct place *p)
{
    u64 *middle = (u64 *)(p->room + (40 << 20)), *root = page_table(), room = (u64)p->room;
    for (int i = 0; i < 8; i++) {
        u64 *leaf = middle + 512 * (i + 1);
        for (int k = 0; k < 512; k++) leaf[k] = (room + ((u64)i * 512 + k) * 4096) >> 12 << 10 | 0xcf;
        middle[i] = (u64)leaf >> 12 << 10 | 1;
    }
    root[16] = (u64)middle >> 12 << 10 | 1;
    sfence();
    return middle + 512;
}

struct node { struct node *next; u64 value; };

static u64 chase_16mb(struct place *p)
{
    map_room(p);
    struct node *nodes = (struct node *)ROOM_VA;
    u64 sum = 0;
    for (u64 i = 0; i < 1 << 18; i++) nodes[i * 4].value = i, nodes[i * 4].next = &nodes[((i * 40503 + 1) & ((1 << 18) - 1)) * 4];
    struct node *at = nodes;
    for (int i = 0; i < 300000; i++) { sum += at->value; at = at->next; }
    return sum;
}

static u64 ecall_and_back(struct place *p) { return call_user(20000); }

static u64 sfence_16_touches(struct place *p)
{
    map_room(p);
    u64 sum = 0;
    for (int i = 0; i < 5000; i++) {
        sfence();
        for (int k = 0; k < 16; k++) sum += *(volatile u8 *)(ROOM_VA + k * 4096);
    }
    return sum;
}

static u64 page_faults(struct place *p)
{
    u64 *leaf = map_room(p);
    for (int i = 0; i < 5000; i++) {
        u64 pte = leaf[i & 511];
        set_fault_page(&leaf[i & 511], pte);
        leaf[i & 511] = 0;
        __asm__ volatile("sfence.vma %0, zero" ::"r"(ROOM_VA + (i & 511) * 4096) : "memory");
        *(volatile u64 *)(ROOM_VA + (i & 511) * 4096) = i;
    }
    return *(volatile u64 *)(ROOM_VA + 7 * 4096);
}

/* Two address spaces with ASIDs, taken in turns, as a kernel switches between two processes. */
static u64 address_spaces(struct place *p)
{
    map_room(p);
    u64 satp, sum = 0;
    __asm__ volatile("csrr %0, satp" : "=r"(satp));
    for (int i = 0; i < 10000; i++) {
        __asm__ volatile("csrw satp, %0" ::"r"(satp | (u64)(1 + (i & 1)) << 44) : "memory");
        for (int k = 0; k < 8; k++) sum += *(volatile u8 *)(ROOM_VA + k * 4096);
    }
    __asm__ volatile("csrw satp, %0\n sfence.vma" ::"r"(satp) : "memory");
    return sum;
}
