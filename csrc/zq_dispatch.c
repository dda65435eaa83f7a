/* Which kernels run. Tables are filled at import and read-only afterwards, but for tests that ask for other choices than the
 * CPU's (zq_cpu_choices_use); zq_level_use() swaps one atomic pointer. Order: ref < avx2 < avxvnni < avx512vnni < amx; each
 * level starts as a copy of the one that it builds on. */
#define _GNU_SOURCE
#include "zq_kernels.h"

#include <stdatomic.h>
#include <string.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

const char *const zq_level_names[ZQ_LEVELS] = {"ref", "avx2", "avxvnni", "avx512vnni", "amx"};

/* Whose kernels a level inherits: those of the next lower level that every CPU with this one has. */
static const zq_level base_level[ZQ_LEVELS] = {ZQ_REF, ZQ_REF, ZQ_AVX2, ZQ_AVX2, ZQ_AVX512VNNI};

#define X(name, ret, args) #name,
const char *const zq_kernel_names[] = {ZQ_KERNELS(X)};
#undef X
const int zq_kernel_count = (int)(sizeof zq_kernel_names / sizeof *zq_kernel_names);

static zq_kernels tables[ZQ_LEVELS];
static _Atomic(const zq_kernels *) active;
static atomic_int active_level;
static int64_t l2_room = 512 << 10;
static zq_cpu_choices asked = {-1, -1};

/* Asked once, as cpuid takes tens of microseconds in a virtual machine; one that hides its caches has what Zen 4 and 5 have.
 * More than 1 MiB has not been measured. */
static void
find_l2_room(void)
{
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) {
        l2_room = zq_max(128 << 10, zq_min(bytes / 2, 1 << 20));
    }
#endif
}

int64_t
zq_l2_room(void)
{
    return l2_room;
}

static void
fill_ref(zq_kernels *t)
{
#define X(name, ret, args) t->name = zq_##name##__ref;
    ZQ_KERNELS(X)
#undef X
    t->mr_u8s8 = t->mr_group = t->mr_f32 = t->mr_matmul = 4;
    t->memory_rows = 32;
}

#if defined(__x86_64__)
/* __builtin_cpu_supports reads cpuid and XCR0: it is true only where the OS saves the registers too. */
static int
has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

/* clang 14 does not know the name: cpuid leaf 7.1, EAX bit 4. The registers are those of AVX2. */
static int
has_avxvnni(void)
{
    unsigned a = 0, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static int
has_avx512vnni(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

/* Tile registers: the CPU has them (leaf 7, EDX bits 24 and 25), the system saves them (XCR0 bits 17 and 18), and this process
 * may use them. Linux grants that on request, to all threads of the process and to what it forks, unless some thread's
 * signal stack is too small for the larger frame. */
static int
has_amx(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d, low, high;
    if (!has_avx512vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) {
        return 0;
    }
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

#endif

/* What is chosen by the CPU's maker; others have the choices of the last line. Intel: the ports of the dot products do all other
 * 512-bit arithmetic too, where AMD's Zen 5 has others for it, so that groups go in tall tiles; and of what is fetched out of
 * memory to L1, so much waits there that little can be read from L2 meanwhile. What comes from L2 or L3 is better fetched to L1
 * there too (by up to a quarter). Zen 4 has what Zen 5 has: nobody has compared them there. */
static const struct {
    char maker[13];
    zq_cpu_choices choices;
} by_maker[] = {
    {"GenuineIntel", {.tall_groups = 1, .fetch_to_l2 = 1}},
    {"AuthenticAMD", {.tall_groups = 0, .fetch_to_l2 = 0}},
    {"", {.tall_groups = 0, .fetch_to_l2 = 0}},
};

static void
find_maker(char maker[13])
{
    memset(maker, 0, 13);
#if defined(__x86_64__)
    unsigned a, part[3] = {0}; /* ebx, ecx, edx, of which the name is the first, the third and the second */
    if (__get_cpuid(0, &a, &part[0], &part[1], &part[2])) {
        memcpy(maker, &part[0], 4);
        memcpy(maker + 4, &part[2], 4);
        memcpy(maker + 8, &part[1], 4);
    }
#endif
}

/* This CPU's, but for what zq_cpu_choices_use asked for. */
static zq_cpu_choices
cpu_choices(void)
{
    char maker[13];
    size_t i = 0;
    find_maker(maker);
    while (by_maker[i].maker[0] && strcmp(by_maker[i].maker, maker) != 0) {
        i++;
    }
    zq_cpu_choices c = by_maker[i].choices;
    c.tall_groups = asked.tall_groups < 0 ? c.tall_groups : asked.tall_groups;
    c.fetch_to_l2 = asked.fetch_to_l2 < 0 ? c.fetch_to_l2 : asked.fetch_to_l2;
    return c;
}

int
zq_level_supported(zq_level level)
{
    switch (level) {
    case ZQ_REF: return 1;
#if defined(__x86_64__)
    case ZQ_AVX2: return has_avx2();
    case ZQ_AVXVNNI: return has_avxvnni();
    case ZQ_AVX512VNNI: return has_avx512vnni();
    case ZQ_AMX: return has_amx();
#endif
    default: return 0;
    }
}

zq_level
zq_level_best(zq_level cap)
{
    while (!zq_level_supported(cap)) {
        cap--;
    }
    return cap;
}

static void
fill_tables(void)
{
    const zq_cpu_choices choices = cpu_choices();
    fill_ref(&tables[ZQ_REF]);
    tables[ZQ_REF].fetch_to_l2 = choices.fetch_to_l2; /* which the other levels inherit */
    tables[ZQ_AVX2] = tables[base_level[ZQ_AVX2]];
#if defined(__x86_64__)
    zq_fill_quantize__avx2(&tables[ZQ_AVX2]);
    zq_fill_nn__avx2(&tables[ZQ_AVX2]);
    zq_fill_gemm__avx2(&tables[ZQ_AVX2]);
#endif
    tables[ZQ_AVXVNNI] = tables[base_level[ZQ_AVXVNNI]];
    tables[ZQ_AVX512VNNI] = tables[base_level[ZQ_AVX512VNNI]];
#if defined(__x86_64__)
    zq_fill_gemm__avxvnni(&tables[ZQ_AVXVNNI]);
    zq_fill_quantize__avx512vnni(&tables[ZQ_AVX512VNNI]);
    zq_fill_nn__avx512vnni(&tables[ZQ_AVX512VNNI]);
    zq_fill_gemm__avx512vnni(&tables[ZQ_AVX512VNNI], choices.tall_groups);
#endif
    tables[ZQ_AMX] = tables[base_level[ZQ_AMX]];
#if defined(__x86_64__)
    zq_fill_nn__amx(&tables[ZQ_AMX]);
    zq_fill_gemm__amx(&tables[ZQ_AMX]);
#endif
}

void
zq_cpu_choices_use(zq_cpu_choices choices)
{
    asked = choices;
    fill_tables();
}

void
zq_level_use(zq_level level)
{
    assert(zq_level_supported(level));
    if (!tables[ZQ_REF].absmax_f32) {
        fill_tables();
        find_l2_room();
    }
    atomic_store(&active_level, (int)level);
    atomic_store(&active, &tables[level]);
}

zq_level
zq_level_active(void)
{
    return (zq_level)atomic_load(&active_level);
}

const zq_kernels *
zq_active(void)
{
    return atomic_load_explicit(&active, memory_order_acquire);
}

zq_level
zq_kernel_origin(zq_level level, int i)
{
    /* Function pointers are compared by their bytes in the table: the list is the front of the struct. */
    void *mine, *below;
    for (; level > ZQ_REF; level = base_level[level]) {
        memcpy(&mine, (const char *)&tables[level] + (size_t)i * sizeof mine, sizeof mine);
        memcpy(&below, (const char *)&tables[base_level[level]] + (size_t)i * sizeof below, sizeof below);
        if (mine != below) {
            break;
        }
    }
    return level;
}
