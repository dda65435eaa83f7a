/* What every C file shares: compiler glue, small arithmetic, memory. */
#ifndef ZQ_COMMON_H
#define ZQ_COMMON_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define ZQ_UNUSED __attribute__((unused))
#define ZQ_INLINE static inline __attribute__((always_inline, unused))

/* ISA code lives in ordinary files compiled without -m flags: the functions between BEGIN and END get
 * the target by pragma, so nothing outside can be compiled for a CPU that is not there.
 * UNROLL stands before a loop over registers, of a constant number of turns, `most` or fewer: as long as a loop indexes an
 * array, the array is in memory. clang takes GCC's pragma for "so many turns at a time" (UNROLL_BY), and does that too late to
 * put the array into registers: products took 3.5 times as long. */
#define ZQ_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define ZQ_TARGET_BEGIN(isa) ZQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define ZQ_TARGET_END _Pragma("clang attribute pop")
#define ZQ_UNROLL(most) _Pragma("clang loop unroll(full)")
#define ZQ_UNROLL_BY(turns) ZQ_PRAGMA(clang loop unroll_count(turns))
#else
#define ZQ_TARGET_BEGIN(isa) _Pragma("GCC push_options") ZQ_PRAGMA(GCC target(isa))
#define ZQ_TARGET_END _Pragma("GCC pop_options")
#define ZQ_UNROLL(most) ZQ_PRAGMA(GCC unroll most)
#define ZQ_UNROLL_BY(turns) ZQ_PRAGMA(GCC unroll turns)
#endif
#define ZQ_TARGET_AVX2 "avx2,fma,f16c"
#define ZQ_TARGET_AVXVNNI "avxvnni,avx2,fma,f16c"
#define ZQ_TARGET_AMX "amx-tile,amx-int8," ZQ_TARGET_AVX512
#define ZQ_TARGET_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"

ZQ_INLINE int64_t
zq_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

ZQ_INLINE int64_t
zq_max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

ZQ_INLINE int64_t
zq_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

ZQ_INLINE int64_t
zq_round_up(int64_t a, int64_t b)
{
    return zq_ceil_div(a, b) * b;
}

/* `bytes` bytes from *free on, whole cache lines. */
ZQ_INLINE void *
zq_take(char **free, int64_t bytes)
{
    char *p = *free;
    *free += zq_round_up(bytes, 64);
    return p;
}

/* Memory for operands: 64-byte aligned, at least one cache line of readable slack behind the end; from
 * 1 MiB on aligned to 2 MiB and advised for huge pages (4 KiB pages cost a third of the DRAM bandwidth).
 * NULL when it does not fit. The one allocator of the core. */
void *zq_alloc(size_t bytes);
void zq_free(void *p);

/* A buffer of this thread that only grows and is freed when the thread ends; slot < ZQ_SCRATCH_SLOTS. Not to be held while a
 * zq_stop is asked. */
enum {
    ZQ_SCRATCH_A,
    ZQ_SCRATCH_Y,
    ZQ_SCRATCH_NN,
    ZQ_SCRATCH_ROW,
    ZQ_SCRATCH_LOW,
    ZQ_SCRATCH_SUMS,
    ZQ_SCRATCH_JOBS,
    ZQ_SCRATCH_SLOTS
};
void *zq_scratch(int slot, size_t bytes);

#endif
