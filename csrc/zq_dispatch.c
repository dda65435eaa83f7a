/* Which kernels run. Tables are filled once, at import, and read-only afterwards; zq_level_use() swaps one
 * atomic pointer. Order: ref < avx2 < avx512vnni; each level starts as a copy of the one below. */
#include "zq_kernels.h"

#include <stdatomic.h>
#include <string.h>

const char *const zq_level_names[ZQ_LEVELS] = {"ref", "avx2", "avx512vnni"};

#define X(name, ret, args) #name,
const char *const zq_kernel_names[] = {ZQ_KERNELS(X)};
#undef X
const int zq_kernel_count = (int)(sizeof zq_kernel_names / sizeof *zq_kernel_names);

static zq_kernels tables[ZQ_LEVELS];
static _Atomic(const zq_kernels *) active;
static atomic_int active_level;

static void
fill_ref(zq_kernels *t)
{
#define X(name, ret, args) t->name = zq_##name##__ref;
    ZQ_KERNELS(X)
#undef X
    t->mr_u8s8 = t->mr_group = t->mr_f32 = t->mr_matmul = 4;
}

zq_level
zq_level_supported(void)
{
#if defined(__x86_64__)
    /* __builtin_cpu_supports reads cpuid and XCR0: it is true only where the OS saves the registers too. */
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) {
        return ZQ_REF;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
        return ZQ_AVX512VNNI;
    }
    return ZQ_AVX2;
#else
    return ZQ_REF;
#endif
}

static void
fill_tables(void)
{
    fill_ref(&tables[ZQ_REF]);
    tables[ZQ_AVX2] = tables[ZQ_REF];
#if defined(__x86_64__)
    zq_fill_quantize__avx2(&tables[ZQ_AVX2]);
    zq_fill_nn__avx2(&tables[ZQ_AVX2]);
    zq_fill_gemm__avx2(&tables[ZQ_AVX2]);
#endif
    tables[ZQ_AVX512VNNI] = tables[ZQ_AVX2];
#if defined(__x86_64__)
    zq_fill_quantize__avx512vnni(&tables[ZQ_AVX512VNNI]);
    zq_fill_nn__avx512vnni(&tables[ZQ_AVX512VNNI]);
    zq_fill_gemm__avx512vnni(&tables[ZQ_AVX512VNNI]);
#endif
}

void
zq_level_use(zq_level level)
{
    assert(level <= zq_level_supported());
    if (!tables[ZQ_REF].absmax_f32) {
        fill_tables();
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
    for (; level > ZQ_REF; level--) {
        memcpy(&mine, (const char *)&tables[level] + (size_t)i * sizeof mine, sizeof mine);
        memcpy(&below, (const char *)&tables[level - 1] + (size_t)i * sizeof below, sizeof below);
        if (mine != below) {
            break;
        }
    }
    return level;
}
