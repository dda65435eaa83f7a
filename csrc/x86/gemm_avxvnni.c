/* Level avxvnni: W8A8 tiles with the 256-bit, VEX-encoded vpdpbusd (client CPUs without AVX-512). What is not here is
 * level avx2's.
 *
 * The bound: Zen 5 starts two vpdpbusd a cycle at either width, so that this level has half of avx512vnni's peak. Latency
 * 4: eight chains and more keep both pipes busy, three rows have twelve. */
#if defined(__x86_64__)
#include "../zq_kernels.h"

#include <string.h>

ZQ_TARGET_BEGIN(ZQ_TARGET_AVXVNNI)
#include "v16_avx2.h"

#include "v16_math.h"

#include "gemm_finish.inc.h"

#include "gemm_256.inc.h"

/* acc[i][v] = sum over k of (a[i][k] - zero[i]) * b[k][8 v + lane] */
ZQ_INLINE void
accumulate_s8(const int mr, const int far, const zq_tile *t, __m256i acc[MR][NV])
{
    const uint8_t *a = t->a;
    const int8_t *b = t->b;
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        const __m256i z = _mm256_set1_epi32(-t->zx[i]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            acc[i][v] = _mm256_mullo_epi32(z, _mm256_loadu_si256((const __m256i *)(t->colsum + 8 * v)));
        }
    }
    for (int64_t k = 0; k < t->k; k += 4, b += ZQ_NR * 4) {
        prefetch_ahead(far, t, b);
#pragma GCC unroll 3
        for (int i = 0; i < mr; i++) {
            const __m256i x = broadcast4(a + i * t->lda + k);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                acc[i][v] = _mm256_dpbusd_avx_epi32(acc[i][v], x, load256(b + 32 * v));
            }
        }
    }
}

ZQ_INLINE void
tile_s8(const int mr, const int far, const zq_tile *t)
{
    __m256i acc[MR][NV];
    accumulate_s8(mr, far, t, acc);
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        store_scaled16(t, i, 0, (v16i){acc[i][0], acc[i][1]});
        store_scaled16(t, i, 16, (v16i){acc[i][2], acc[i][3]});
    }
}

ZQ_INLINE void
tile_s8_s32(const int mr, const zq_tile *t, int32_t *c, int64_t ldc)
{
    __m256i acc[MR][NV];
    accumulate_s8(mr, 0, t, acc);
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        store_s32(t, c + i * ldc, 0, (v16i){acc[i][0], acc[i][1]});
        store_s32(t, c + i * ldc, 16, (v16i){acc[i][2], acc[i][3]});
    }
}

#define S8(n) \
    case n: tile_s8(n, 0, t); break;
#define S8_FAR(n) \
    case n: tile_s8(n, 1, t); break;
#define S32(n) \
    case n: tile_s8_s32(n, t, c, ldc); break;

static void
zq_gemm_u8s8_3x32_tile__avxvnni(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS3, S8)
}

static void
zq_gemm_u8s8_3x32__avxvnni(const zq_tile *t)
{
    run_tile(t, zq_gemm_u8s8_3x32_tile__avxvnni);
}

static void
zq_gemm_u8s8_s32_3x32__avxvnni(const zq_tile *t, int32_t *c, int64_t ldc)
{
    switch (t->mr) { ROWS3(S32) }
}

ZQ_TARGET_END

void
zq_fill_gemm__avxvnni(zq_kernels *t)
{
    t->gemm_u8s8 = zq_gemm_u8s8_3x32__avxvnni;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_3x32__avxvnni;
    t->mr_u8s8 = MR;
}
#else
typedef int zq_no_x86;
#endif
