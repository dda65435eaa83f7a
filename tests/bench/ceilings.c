/* What this CPU can do at most: instruction throughput from registers, and read bandwidth. Built on demand by
 * ceilings.py and loaded with ctypes. Every kernel is inline assembly behind a cpuid check, so that no -march flag
 * is needed and the compiler cannot improve the work away.
 *
 * A slice on several threads: the helpers sleep in the kernel (they must not take a core from the code under
 * test), are woken, and everyone starts when all are awake. The result is the sum of the threads' own rates. */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 64, UNROLL = 48, FAR_BYTES = 16 << 20 };

static double
now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- register-only loops: 12 independent chains, four times unrolled ------------------------------ */
#define X4(s) s s s s
#define CHAINS(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define CLOBBERS                                                                                                    \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",      \
        "xmm13", "xmm14", "xmm15", "cc", "memory"
/* 0 * 0 + 0: operands must not be denormal or NaN whatever was in the registers before */
#define ZERO_ALL                                                                                                    \
    "vpxor %%xmm0,%%xmm0,%%xmm0\n vpxor %%xmm1,%%xmm1,%%xmm1\n vpxor %%xmm2,%%xmm2,%%xmm2\n"                        \
    "vpxor %%xmm3,%%xmm3,%%xmm3\n vpxor %%xmm4,%%xmm4,%%xmm4\n vpxor %%xmm5,%%xmm5,%%xmm5\n"                        \
    "vpxor %%xmm6,%%xmm6,%%xmm6\n vpxor %%xmm7,%%xmm7,%%xmm7\n vpxor %%xmm8,%%xmm8,%%xmm8\n"                        \
    "vpxor %%xmm9,%%xmm9,%%xmm9\n vpxor %%xmm10,%%xmm10,%%xmm10\n vpxor %%xmm11,%%xmm11,%%xmm11\n"                  \
    "vpxor %%xmm12,%%xmm12,%%xmm12\n vpxor %%xmm13,%%xmm13,%%xmm13\n"                                              \
    "vpxor %%xmm14,%%xmm14,%%xmm14\n vpxor %%xmm15,%%xmm15,%%xmm15\n"
#define LOOP(name, body)                                                                                            \
    static void name(long n)                                                                                        \
    {                                                                                                               \
        __asm__ volatile(ZERO_ALL ".p2align 6\n1:\n" body "dec %0\n jnz 1b\n vzeroupper\n" : "+r"(n)::CLOBBERS);     \
    }
#define VNNI(i) "vpdpbusd %%zmm14,%%zmm15,%%zmm" #i "\n"
#define FMA512(i) "vfmadd231ps %%zmm14,%%zmm15,%%zmm" #i "\n"
#define FMA256(i) "vfmadd231ps %%ymm14,%%ymm15,%%ymm" #i "\n"
#define VNNI256(i) "%{vex%} vpdpbusd %%ymm14,%%ymm15,%%ymm" #i "\n"
/* What level avx2 runs, 32 products each: u8 x s8 with the sign moved over (gemm_avx2.c) ... */
#define SIGNS256(i)                                                                                                 \
    "vpsignb %%ymm15,%%ymm14,%%ymm12\n vpmaddubsw %%ymm12,%%ymm13,%%ymm12\n"                                        \
    "vpmaddwd %%ymm14,%%ymm12,%%ymm12\n vpaddd %%ymm12,%%ymm" #i ",%%ymm" #i "\n"
/* ... and codes of four bits: 32 k in int16 (the first products need no addition), then wider */
#define FIRST256(i) "vpmaddubsw %%ymm14,%%ymm15,%%ymm" #i "\n"
#define NIBBLES256(i) "vpmaddubsw %%ymm14,%%ymm15,%%ymm12\n vpaddw %%ymm12,%%ymm" #i ",%%ymm" #i "\n"
#define WIDEN256(i) "vpmaddwd %%ymm14,%%ymm" #i ",%%ymm12\n vpaddd %%ymm12,%%ymm13,%%ymm13\n"
/* 32 k of all chains, in both ways, and what the end of a group adds whatever computed its sum: to float, times the scale */
#define NIBBLES256_K32                                                                                              \
    CHAINS(FIRST256) CHAINS(NIBBLES256) CHAINS(NIBBLES256) CHAINS(NIBBLES256) X4(CHAINS(NIBBLES256)) CHAINS(WIDEN256)
#define VNNI256_K32 X4(CHAINS(VNNI256)) X4(CHAINS(VNNI256))
#define GROUP256(i) "vcvtdq2ps %%ymm" #i ",%%ymm12\n vfmadd213ps %%ymm15,%%ymm14,%%ymm12\n"

#if defined(__x86_64__)
LOOP(loop_vnni, X4(CHAINS(VNNI)))
LOOP(loop_fma512, X4(CHAINS(FMA512)))
LOOP(loop_fma256, X4(CHAINS(FMA256)))
LOOP(loop_vnni256, X4(CHAINS(VNNI256)))
LOOP(loop_signs256, X4(CHAINS(SIGNS256)))
#define GROUP_LOOPS(name, k32)                                                                                      \
    LOOP(name##_g32, k32 CHAINS(GROUP256))                                                                          \
    LOOP(name##_g64, k32 k32 CHAINS(GROUP256))                                                                      \
    LOOP(name##_g128, X4(k32) CHAINS(GROUP256))
/* AMX: products of 16 rows, 64 k and 16 columns each, sums in four registers, operands in four */
#define TILES                                                                                                       \
    "tdpbusd %%tmm6,%%tmm4,%%tmm0\n tdpbusd %%tmm7,%%tmm4,%%tmm1\n"                                                 \
    "tdpbusd %%tmm6,%%tmm5,%%tmm2\n tdpbusd %%tmm7,%%tmm5,%%tmm3\n"
static void
loop_tiles(long n)
{
    static const unsigned char config[64] = {
        [0] = 1, [16] = 64, [18] = 64, [20] = 64, [22] = 64, [24] = 64, [26] = 64, [28] = 64, [30] = 64,
        [48] = 16, [49] = 16, [50] = 16, [51] = 16, [52] = 16, [53] = 16, [54] = 16, [55] = 16};
    __asm__ volatile("ldtilecfg (%1)\n .p2align 6\n1:\n" X4(TILES TILES TILES) "dec %0\n jnz 1b\n tilerelease\n"
                     : "+r"(n) : "r"(config) : "cc", "memory");
}
GROUP_LOOPS(loop_nibbles256, NIBBLES256_K32)
GROUP_LOOPS(loop_vnni256, VNNI256_K32)

#define READ_LOOP(name, body)                                                                                       \
    static void name(const char *p, size_t bytes)                                                                   \
    {                                                                                                               \
        size_t quarters = bytes / 256;                                                                              \
        __asm__ volatile("1:\n" body "add $256,%0\n dec %1\n jnz 1b\n vzeroupper\n"                                \
                         : "+r"(p), "+r"(quarters)::CLOBBERS);                                                      \
    }
/* Software prefetch helps where the data comes from DRAM and costs load slots everywhere else. */
#define PREFETCH "prefetcht0 4096(%0)\n prefetcht0 4160(%0)\n prefetcht0 4224(%0)\n prefetcht0 4288(%0)\n"
#define LOAD512 \
    "vmovdqu64 (%0),%%zmm0\n vmovdqu64 64(%0),%%zmm1\n vmovdqu64 128(%0),%%zmm2\n vmovdqu64 192(%0),%%zmm3\n"
#define LOAD256                                                                                                     \
    "vmovdqu (%0),%%ymm0\n vmovdqu 32(%0),%%ymm1\n vmovdqu 64(%0),%%ymm2\n vmovdqu 96(%0),%%ymm3\n"                 \
    "vmovdqu 128(%0),%%ymm4\n vmovdqu 160(%0),%%ymm5\n vmovdqu 192(%0),%%ymm6\n vmovdqu 224(%0),%%ymm7\n"
READ_LOOP(read512, LOAD512)
READ_LOOP(read256, LOAD256)
READ_LOOP(read512_far, PREFETCH LOAD512)
READ_LOOP(read256_far, PREFETCH LOAD256)
#endif

/* 0: neither, 1: AVX2 + FMA, 2: AVX-512 with VNNI */
int
zqb_isa(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")) {
        return 2;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
#else
    return 0;
#endif
}

enum {
    KIND_VNNI, KIND_FMA512, KIND_SIGNS256, KIND_FMA256, KIND_NIBBLES256_G128, KIND_NIBBLES256_G64, KIND_NIBBLES256_G32,
    KIND_VNNI256, KIND_VNNI256_G128, KIND_VNNI256_G64, KIND_VNNI256_G32, KIND_TILES, KINDS
};

static void
run_loop(int kind, long n)
{
#if defined(__x86_64__)
    switch (kind) {
    case KIND_VNNI: loop_vnni(n); break;
    case KIND_FMA512: loop_fma512(n); break;
    case KIND_SIGNS256: loop_signs256(n); break;
    case KIND_NIBBLES256_G128: loop_nibbles256_g128(n); break;
    case KIND_NIBBLES256_G64: loop_nibbles256_g64(n); break;
    case KIND_NIBBLES256_G32: loop_nibbles256_g32(n); break;
    case KIND_VNNI256_G128: loop_vnni256_g128(n); break;
    case KIND_VNNI256_G64: loop_vnni256_g64(n); break;
    case KIND_VNNI256_G32: loop_vnni256_g32(n); break;
    case KIND_FMA256: loop_fma256(n); break;
    case KIND_TILES: loop_tiles(n); break;
    default: loop_vnni256(n); break;
    }
#else
    (void)kind, (void)n;
#endif
}

/* AVX-VNNI: CPUID leaf 7, subleaf 1, EAX bit 4 (compilers' cpu_supports does not know it everywhere). */
static int
has_avxvnni(void)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return zqb_isa() >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4) != 0;
#else
    return 0;
#endif
}

/* AMX: in the CPU, saved by the system, and allowed to this process, which has to ask (as zq_dispatch.c does). */
static int
has_tiles(void)
{
#if defined(__x86_64__)
    unsigned a, b, c, d, low, high;
    if (zqb_isa() < 2 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) {
        return 0;
    }
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

/* Whether this CPU has the instructions of a kind. */
int
zqb_runs(int kind)
{
    if (kind == KIND_TILES) {
        return has_tiles();
    }
    if (kind >= KIND_VNNI256 && kind < KINDS) {
        return has_avxvnni();
    }
    return kind >= 0 && kind < KINDS && zqb_isa() >= (kind <= KIND_FMA512 ? 2 : 1);
}

/* Operations (a multiply and an add are two) of one of the UNROLL parts of an iteration: longer groups, longer iterations. */
static const double ops_of_kind[KINDS] = {128, 32, 64, 16, 512, 256, 128, 64, 512, 256, 128, 32768};

/* ---- a team of pinned threads -------------------------------------------------------------------- */
typedef struct {
    int kind; /* of loop, or -1: read */
    long n;   /* iterations, or passes */
    size_t bytes; /* of the buffer; `part` of it is read, from `from` on */
    size_t from, part;
} task;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int helpers, team;
    unsigned generation;
    task what;
    atomic_int ready, done;
    int cpu[MAX_THREADS];
    double rate[MAX_THREADS];
    char *buffer[MAX_THREADS], *mapped[MAX_THREADS];
    size_t bytes[MAX_THREADS];
} team = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* Huge pages where the kernel grants them: with 4 KiB pages address translation is what one measures. */
static char *
buffer_of(int id, size_t bytes)
{
    const size_t huge = 2u << 20;
    if (team.bytes[id] < bytes) {
        if (team.bytes[id]) {
            munmap(team.mapped[id], team.bytes[id] + huge + 8192);
        }
        team.bytes[id] = 0;
        char *p = mmap(NULL, bytes + huge + 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) {
            return NULL;
        }
        team.mapped[id] = p;
        madvise(p, bytes + huge, MADV_HUGEPAGE);
        p = (char *)(((uintptr_t)p + huge - 1) & ~(uintptr_t)(huge - 1));
        memset(p, 1, bytes);
        team.buffer[id] = p;
        team.bytes[id] = bytes;
    }
    return team.buffer[id];
}

static void
read_passes(const char *p, const task *t)
{
#if defined(__x86_64__)
    const int far = t->bytes >= FAR_BYTES, wide = zqb_isa() == 2;
    void (*const loop)(const char *, size_t) = wide ? (far ? read512_far : read512) : (far ? read256_far : read256);
    for (long i = 0; i < t->n; i++) {
        loop(p + t->from, t->part);
    }
#else
    (void)p, (void)t;
#endif
}

static void
take_part(int id, const task *t, int threads)
{
    char *p = t->kind < 0 ? buffer_of(id, t->bytes) : NULL;
    atomic_fetch_add(&team.ready, 1);
    while (atomic_load(&team.ready) < threads) {
        if (team.team > 2) {
            sched_yield(); /* more threads than CPUs must not deadlock the start */
        }
    }
    const double start = now();
    double work = 0;
    if (t->kind >= 0) {
        run_loop(t->kind, t->n);
        work = (double)t->n * UNROLL * ops_of_kind[t->kind];
    }
    else if (p) {
        read_passes(p, t);
        work = (double)t->n * (double)t->part;
    }
    team.rate[id] = work / (now() - start) / 1e9;
    atomic_fetch_add(&team.done, 1);
}

static void
pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *
helper(void *arg)
{
    const int id = (int)(intptr_t)arg;
    pin(team.cpu[id]);
    unsigned seen = 0;
    for (;;) {
        pthread_mutex_lock(&team.lock);
        while (team.generation == seen) {
            pthread_cond_wait(&team.wake, &team.lock);
        }
        seen = team.generation;
        const int threads = team.team;
        const task t = team.what;
        pthread_mutex_unlock(&team.lock);
        if (id < threads) {
            take_part(id, &t, threads);
        }
    }
    return NULL;
}

/* Helpers run on cpus[1..n-1]; the caller is thread 0 and should sit on cpus[0]. 0 on success. */
int
zqb_team(const int *cpus, int n)
{
    if (n < 1 || n > MAX_THREADS) {
        return -1;
    }
    for (int i = team.helpers + 1; i < n; i++) {
        pthread_t t;
        team.cpu[i] = cpus[i];
        if (pthread_create(&t, NULL, helper, (void *)(intptr_t)i) != 0) {
            return -1;
        }
        pthread_detach(t);
        team.helpers = i;
    }
    return 0;
}

static double
run(task t, int threads)
{
    if (threads < 1 || threads > team.helpers + 1) {
        return -1;
    }
    atomic_store(&team.ready, 0);
    atomic_store(&team.done, 0);
    pthread_mutex_lock(&team.lock);
    team.team = threads;
    team.what = t;
    team.generation += threads > 1;
    if (threads > 1) {
        pthread_cond_broadcast(&team.wake);
    }
    pthread_mutex_unlock(&team.lock);
    take_part(0, &t, threads);
    double sum = 0;
    while (atomic_load(&team.done) < threads) {
    }
    for (int i = 0; i < threads; i++) {
        sum += team.rate[i];
    }
    return sum;
}

/* One slice of about `seconds` of instruction kind `kind`: 1e9 operations a second, all threads together. */
double
zqb_peak(int kind, int threads, double seconds)
{
    static double fastest[KINDS]; /* of one thread: sets the length of a slice */
    if (!zqb_runs(kind)) {
        return 0;
    }
    for (int i = 0; fastest[kind] == 0 || i < 3; i++) {
        const double start = now();
        run_loop(kind, 2000);
        const double rate = 2000 / (now() - start);
        fastest[kind] = rate > fastest[kind] ? rate : fastest[kind];
    }
    return run((task){.kind = kind, .n = (long)(fastest[kind] * seconds) + 1}, threads);
}

/* Read `bytes` (a multiple of 256) per thread `passes` times: GB/s, all threads together. */
double
zqb_read(size_t bytes, long passes, int threads)
{
    if (zqb_isa() == 0 || bytes < 256 || passes < 1) {
        return 0;
    }
    bytes = bytes / 256 * 256;
    return run((task){.kind = -1, .n = passes, .bytes = bytes, .part = bytes}, threads);
}

/* Read `part` bytes of a buffer of `bytes` from `from` on, per thread (multiples of 256): GB/s, all threads together
 * at the pace of the slowest, as for work that is shared out. */
double
zqb_read_part(size_t bytes, size_t from, size_t part, int threads)
{
    if (zqb_isa() == 0 || part < 256 || from + part > bytes || bytes % 256 || from % 256 || part % 256) {
        return 0;
    }
    double slowest = run((task){.kind = -1, .n = 1, .bytes = bytes, .from = from, .part = part}, threads);
    for (int i = 0; i < threads; i++) {
        slowest = team.rate[i] < slowest ? team.rate[i] : slowest;
    }
    return threads * slowest;
}
