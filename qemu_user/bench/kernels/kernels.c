/* The kernels of `softkvm bench cpu` and `fp`: the same source, by the same compiler, native and in the guest. */
#include "kernels.h"

static void say(struct place *p, const char *text) { while (*text) p->put(*text++); }

static void say_number(struct place *p, u64 n)
{
    char digits[24];
    int i = 0;
    do { digits[i++] = '0' + n % 10; n /= 10; } while (n);
    while (i) p->put(digits[--i]);
}

/* -- integer ------------------------------------------------------------------------------------------------ */

static u64 sieve(struct place *p)
{
    u8 *flags = p->room;
    u64 count = 0;
    for (u32 i = 2; i < 1 << 20; i++) flags[i] = 1;
    for (u32 i = 2; i < 1 << 20; i++)
        if (flags[i]) {
            count++;
            for (u32 j = i + i; j < 1 << 20; j += i) flags[j] = 0;
        }
    return count;
}

static NOINLINE void sort(int *a, int left, int right)
{
    if (left >= right) return;
    int pivot = a[(left + right) / 2], i = left, j = right;
    while (i <= j) {
        while (a[i] < pivot) i++;
        while (a[j] > pivot) j--;
        if (i <= j) { int t = a[i]; a[i++] = a[j]; a[j--] = t; }
    }
    sort(a, left, j);
    sort(a, i, right);
}

static u64 quicksort(struct place *p)
{
    int *a = (int *)p->room;
    u32 x = 1;
    for (int i = 0; i < 1 << 17; i++) { x = x * 1103515245 + 12345; a[i] = x >> 8; }
    sort(a, 0, (1 << 17) - 1);
    return a[100] + a[100000];
}

static u32 rotate(u32 x, int n) { return x >> n | x << (32 - n); }

static u64 sha256_like(struct place *p)
{
    u32 *w = (u32 *)p->room, h[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int block = 0; block < 4000; block++) {
        for (int i = 0; i < 16; i++) w[i] = block * 31 + i;
        for (int i = 16; i < 64; i++) {
            u32 a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
        }
        for (int i = 0; i < 64; i++) {
            u32 t1 = h[7] + (rotate(h[4], 6) ^ rotate(h[4], 11) ^ rotate(h[4], 25)) + ((h[4] & h[5]) ^ (~h[4] & h[6])) + w[i];
            u32 t2 = (rotate(h[0], 2) ^ rotate(h[0], 13) ^ rotate(h[0], 22)) + ((h[0] & h[1]) ^ (h[0] & h[2]) ^ (h[1] & h[2]));
            h[7] = h[6]; h[6] = h[5]; h[5] = h[4]; h[4] = h[3] + t1;
            h[3] = h[2]; h[2] = h[1]; h[1] = h[0]; h[0] = t1 + t2;
        }
    }
    return h[0] ^ (u64)h[4] << 32;
}

static u64 crc32(struct place *p)
{
    u32 c = ~0u;
    for (int i = 0; i < 1 << 17; i++) {
        c ^= (u8)(i * 7);
        for (int k = 0; k < 8; k++) c = c & 1 ? c >> 1 ^ 0xEDB88320 : c >> 1;
    }
    return c;
}

/* LZ77 with a hash of three bytes: compress, then expand and compare. */
static u64 compress(struct place *p)
{
    enum { SIZE = 1 << 17 };
    u8 *in = p->room, *out = in + SIZE, *back = out + 2 * SIZE;
    u32 *heads = (u32 *)(back + SIZE), x = 7;
    for (int i = 0; i < SIZE; i++) {
        x = x * 1664525 + 1013904223;
        in[i] = (x >> 28) < 11 && i > 64 ? in[i - 1 - (x >> 8 & 63)] : x >> 24 & 15;
    }
    for (int i = 0; i < 4096; i++) heads[i] = 0;
    u32 at = 0, length = 0;
    while (at + 4 < SIZE) {
        u32 key = (in[at] | in[at + 1] << 8 | in[at + 2] << 16) * 2654435761u >> 20, from = heads[key], same = 0;
        heads[key] = at;
        if (from < at && at - from < 65536)
            while (at + same < SIZE && same < 255 && in[from + same] == in[at + same]) same++;
        if (same >= 4) {
            out[length++] = same; out[length++] = (at - from) & 255; out[length++] = (at - from) >> 8;
            at += same;
        } else { out[length++] = 0; out[length++] = in[at++]; }
    }
    u32 end = 0;
    for (u32 i = 0; i < length;) {
        if (out[i]) {
            u32 distance = out[i + 1] | out[i + 2] << 8;
            for (u32 n = out[i]; n; n--, end++) back[end] = back[end - distance];
            i += 3;
        } else { back[end++] = out[i + 1]; i += 2; }
    }
    for (u32 i = 0; i < end; i++) if (back[i] != in[i]) return 0;
    return length;
}

static u64 interpreter(struct place *p)
{
    static const u8 program[] = {0, 1, 2, 3, 0, 4, 5, 1, 6};
    u64 a = 0, left = 300000;
    for (int pc = 0;;) {
        switch (program[pc++]) {
        case 0: a += left; break;
        case 1: a ^= a << 3; break;
        case 2: a += 7; break;
        case 3: a = a >> 1 | a << 63; break;
        case 4: a *= 3; break;
        case 5: a -= left; break;
        case 6: if (!--left) return a; pc = 0; break;
        case 7: a = 0; break;
        case 8: a = ~a; break;
        }
    }
}

typedef u64 (*step)(u64);
static NOINLINE u64 step0(u64 x) { return x + 1; }
static NOINLINE u64 step1(u64 x) { return x ^ x >> 3; }
static NOINLINE u64 step2(u64 x) { return x * 5; }
static NOINLINE u64 step3(u64 x) { return x - 9; }

static u64 indirect(struct place *p)
{
    volatile step *table = (volatile step *)p->room;
    table[0] = step0; table[1] = step1; table[2] = step2; table[3] = step3;
    u64 x = 12345;
    for (u32 i = 0; i < 1000000; i++) x = table[i * 2654435761u >> 30](x);
    return x;
}

static NOINLINE u64 fib(u64 n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static u64 recursion(struct place *p) { return fib(27); }

struct record { struct record *next; u32 kind, number; char name[24]; };

static NOINLINE int same_name(const char *a, const char *b)
{
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

/* Records, strings and calls, as Dhrystone has them. */
static u64 dhrystone_like(struct place *p)
{
    struct record *records = (struct record *)p->room;
    u64 sum = 0;
    for (int i = 0; i < 64; i++) {
        records[i].next = &records[(i * 7 + 1) & 63];
        records[i].kind = i % 3; records[i].number = i;
        for (int k = 0; k < 23; k++) records[i].name[k] = 'A' + (k < 20 ? k : i % 5);
        records[i].name[23] = 0;
    }
    struct record *r = records;
    for (int i = 0; i < 150000; i++) {
        struct record *n = r->next;
        if (n->kind == 0) n->number += 2;
        else if (n->kind == 1) { if (same_name(r->name, n->name)) sum++; }
        else { r->number = n->number * 3 + i; n->kind = (r->number >> 4) % 3; }
        sum += r->number;
        r = n;
    }
    return sum;
}

/* A list, a matrix and a state machine over text, as CoreMark has them. */
static u64 coremark_like(struct place *p)
{
    short *m = (short *)p->room;
    u8 *text = p->room + 65536;
    u64 sum = 0;
    for (int i = 0; i < 3 * 400; i++) m[i] = i * 7 - 300;
    for (int i = 0; i < 4096; i++) text[i] = "0123.56e+7,-89x "[(i * 11 + i / 16) & 15];
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 20; i++)
            for (int j = 0; j < 20; j++) {
                int x = 0;
                for (int k = 0; k < 20; k++) x += m[i * 20 + k] * m[400 + k * 20 + j];
                m[800 + i * 20 + j] = x >> 8;
                sum += x;
            }
        int state = 0;
        for (int i = 0; i < 4096; i++) {
            u8 c = text[i];
            switch (state) {
            case 0: state = c >= '0' && c <= '9' ? 1 : c == '-' || c == '+' ? 2 : c == '.' ? 3 : 0; break;
            case 1: state = c == '.' ? 3 : c == 'e' ? 4 : c >= '0' && c <= '9' ? 1 : 0; break;
            case 2: state = c >= '0' && c <= '9' ? 1 : 5; break;
            case 3: state = c == 'e' ? 4 : c >= '0' && c <= '9' ? 3 : 0; break;
            case 4: state = c == '+' || c == '-' ? 2 : 5; break;
            default: state = c == ',' ? 0 : 5;
            }
            sum = sum * 31 + state;
        }
    }
    return sum;
}

static u64 matrix(struct place *p)
{
    enum { N = 96 };
    int *a = (int *)p->room, *b = a + N * N, *c = b + N * N;
    u64 sum = 0;
    for (int i = 0; i < N * N; i++) { a[i] = i * 3 - 7; b[i] = i ^ 5; }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            int x = 0;
            for (int k = 0; k < N; k++) x += a[i * N + k] * b[k * N + j];
            sum += c[i * N + j] = x;
        }
    return sum;
}

static u64 strings(struct place *p)
{
    char *a = (char *)p->room, *b = a + 8192;
    u64 sum = 0;
    for (int round = 0; round < 60; round++) {
        for (int i = 0; i < 4095; i++) a[i] = b[i] = 'a' + (i + round) % 23;
        a[4095] = b[4095] = 0;
        b[4000 + round] = '!';
        sum += same_name(a, b);
        int i = 0;
        while (a[i] && a[i] == b[i]) i++;
        sum += i;
        u64 *to = (u64 *)(b + 8192);
        for (int k = 0; k < 512; k++) to[k] = ((u64 *)a)[k] + k;
        sum += to[round];
    }
    return sum;
}

/* -- floating point ------------------------------------------------------------------------------------------- */

static u64 bits(double d) { union { double d; u64 u; } z = {d}; return z.u; }

static u64 matmul(struct place *p)
{
    enum { N = 64 };
    double *a = (double *)p->room, *b = a + N * N, sum = 0;
    for (int i = 0; i < N * N; i++) { a[i] = i * 0.5 - 3; b[i] = 7 - i * 0.25; }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            double x = 0;
            for (int k = 0; k < N; k++) x += a[i * N + k] * b[k * N + j];
            sum += x;
        }
    return bits(sum);
}

static u64 nbody(struct place *p)
{
    double (*r)[3] = (double (*)[3])p->room, (*v)[3] = r + 5, m[5];
    for (int i = 0; i < 5; i++) {
        m[i] = 1.0 / (i + 1);
        for (int k = 0; k < 3; k++) { r[i][k] = i * 1.7 + k * 0.3; v[i][k] = 0.01 * i - 0.02 * k; }
    }
    for (int s = 0; s < 3000; s++) {
        for (int i = 0; i < 5; i++)
            for (int j = i + 1; j < 5; j++) {
                double d[3], q = 0.01;
                for (int k = 0; k < 3; k++) { d[k] = r[i][k] - r[j][k]; q += d[k] * d[k]; }
                double g = 0.001 / (q * __builtin_sqrt(q));
                for (int k = 0; k < 3; k++) { v[i][k] -= d[k] * m[j] * g; v[j][k] += d[k] * m[i] * g; }
            }
        for (int i = 0; i < 5; i++) for (int k = 0; k < 3; k++) r[i][k] += 0.001 * v[i][k];
    }
    return bits(r[0][0] + r[4][2]);
}

static u64 conversions(struct place *p)
{
    double d = 1.5;
    float f = 0.25f;
    u64 sum = 0;
    for (int i = 0; i < 100000; i++) {
        int n = (int)d;
        sum += n + (long)(f * 16);
        d = (double)(i ^ n) * 0.001 + f;
        f = (float)d * 0.5f + (float)(i & 15);
        if (d > 50) d -= 40;
    }
    return sum;
}

static u64 mandelbrot(struct place *p)
{
    u64 sum = 0;
    for (int y = 0; y < 48; y++)
        for (int x = 0; x < 64; x++) {
            double a = x / 24.0 - 2, b = y / 20.0 - 1.2, zr = 0, zi = 0;
            int n = 0;
            while (n < 100 && zr * zr + zi * zi < 4) { double t = zr * zr - zi * zi + a; zi = 2 * zr * zi + b; zr = t; n++; }
            sum += n;
        }
    return sum;
}

#ifdef GUEST
#include "mmu.h"
#endif

/* A function, not a table: a table would need relocations. */
static struct kernel kernel_at(int number)
{
    switch (number) {
#define K(n, g, f) case n: return (struct kernel){g, #f, f};
    K(0, "cpu", coremark_like) K(1, "cpu", dhrystone_like) K(2, "cpu", sieve) K(3, "cpu", quicksort)
    K(4, "cpu", sha256_like) K(5, "cpu", crc32) K(6, "cpu", compress) K(7, "cpu", interpreter)
    K(8, "cpu", indirect) K(9, "cpu", recursion) K(10, "cpu", matrix) K(11, "cpu", strings)
    K(12, "fp", matmul) K(13, "fp", nbody) K(14, "fp", conversions) K(15, "fp", mandelbrot)
#ifdef GUEST
    K(16, "mmu", chase_16mb) K(17, "mmu", ecall_and_back) K(18, "mmu", sfence_16_touches) K(19, "mmu", page_faults)
    K(20, "mmu", address_spaces)
#endif
    default: return (struct kernel){0, 0, 0};
    }
}

static int equal(const char *a, const char *b) { return same_name(a, b); }

void run_group(struct place *p, const char *group, u64 budget)
{
    for (int number = 0;; number++) {
        struct kernel k = kernel_at(number);
        if (!k.run) return;
        if (!equal(k.group, group)) continue;
        u64 best = ~0ul, first = 0, rounds = 0, result = 0, begin = p->ticks();
        do {
            u64 t = p->ticks();
            result = k.run(p);
            t = p->ticks() - t;
            if (!rounds++) first = t;
            if (t < best) best = t;
        } while (p->ticks() - begin < budget);
        say(p, k.name); p->put(' '); say_number(p, best); p->put(' '); say_number(p, first);
        p->put(' '); say_number(p, rounds); p->put(' '); say_number(p, result); p->put('\n');
    }
}
