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

/* A constant that stays in memory, as an operand: in loops that need all registers for something else. */
ZQ_INLINE __m256i
constant16(const int16_t *p)
{
    __asm__("" : "+r"(p));
    return load256(p);
}

#define X16(v) {v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}
static const _Alignas(32) int16_t low_nibbles[16] = X16(0x0f0f);

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

/* Four deep: unsigned codes, of four bits in the low or the high nibbles or of eight, times signed activations. */
ZQ_INLINE void
step_group(const int mr, const int four_bits, const int shift, const uint8_t *a, int64_t lda, const uint8_t *b,
           __m256i acc[MR][NV])
{
    __m256i x[MR];
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        x[i] = broadcast4(a + i * lda);
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
        __m256i w = load256(b + 32 * v);
        w = shift ? _mm256_srli_epi16(w, 4) : w;
        w = four_bits ? _mm256_and_si256(w, constant16(low_nibbles)) : w;
#pragma GCC unroll 3
        for (int i = 0; i < mr; i++) {
            acc[i][v] = _mm256_dpbusd_avx_epi32(acc[i][v], w, x[i]);
        }
    }
}

/* acc += the n codes of one group, at b, times activations. Nibbles are read twice: there are no registers to keep them in. */
ZQ_INLINE void
accumulate_group(const int mr, const int four_bits, const int far, const zq_tile *t, const uint8_t *a, int64_t n,
                 const uint8_t *b, __m256i acc[MR][NV])
{
    const int64_t lda = t->lda;
    for (; n > 0; n -= ZQ_KSTEP, a += ZQ_KSTEP, b += ZQ_NR * 4) {
        prefetch_ahead(far, t, b);
        step_group(mr, four_bits, 0, a, lda, b, acc);
        if (!four_bits) {
            b += ZQ_NR * 4;
            prefetch_ahead(far, t, b);
        }
        leave_registers(b);
        step_group(mr, four_bits, four_bits, a + 4, lda, b, acc);
    }
}

/* The float sums stay in memory: the integer ones take the registers. */
ZQ_INLINE void
tile_group(const int mr, const int four_bits, const int far, const zq_tile *t)
{
    v16 f[MR][2];
    const int64_t bytes = ZQ_NR * (4 + (four_bits ? t->group / 2 : t->group));
    const uint8_t *panel = t->b, *a = t->a;
    const int32_t *start = t->start;
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        f[i][0] = f[i][1] = v16_zero();
    }
    for (int64_t k = 0; k < t->k; k += t->group, a += t->group, panel += bytes, start++) {
        __m256i acc[MR][NV];
#pragma GCC unroll 3
        for (int i = 0; i < mr; i++) {
            acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = _mm256_set1_epi32(start[i * t->ld_start]);
        }
        prefetch_ahead(far, t, panel);
        leave_registers(f);
        accumulate_group(mr, four_bits, far, t, a, zq_min(t->group, t->k - k), panel + 4 * ZQ_NR, acc);
        leave_registers(f);
#pragma GCC unroll 3
        for (int i = 0; i < mr; i++) {
            const float *scale = (const float *)panel;
            f[i][0] = v16_fma(v16_from_i((v16i){acc[i][0], acc[i][1]}), v16_load(scale), f[i][0]);
            f[i][1] = v16_fma(v16_from_i((v16i){acc[i][2], acc[i][3]}), v16_load(scale + 16), f[i][1]);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        store_group16(t, i, 0, f[i][0]);
        store_group16(t, i, 16, f[i][1]);
    }
}

#define S8(n, far) \
    case n: tile_s8(n, far, t); break;
#define S32(n, far) \
    case n: tile_s8_s32(n, t, c, ldc); break;
#define G8(n, far) \
    case n: tile_group(n, 0, far, t); break;
#define G4(n, far) \
    case n: tile_group(n, 1, far, t); break;

static void
zq_gemm_s8u8_group_3x32_tile__avxvnni(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS3, G8)
}

static void
zq_gemm_s8u8_group_3x32__avxvnni(const zq_tile *t)
{
    run_tile(t, zq_gemm_s8u8_group_3x32_tile__avxvnni);
}

static void
zq_gemm_s8u4_group_3x32_tile__avxvnni(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS3, G4)
}

static void
zq_gemm_s8u4_group_3x32__avxvnni(const zq_tile *t)
{
    run_tile(t, zq_gemm_s8u4_group_3x32_tile__avxvnni);
}

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
    switch (t->mr) { ROWS3(S32, 0) }
}

ZQ_TARGET_END

void
zq_fill_gemm__avxvnni(zq_kernels *t)
{
    t->gemm_u8s8 = zq_gemm_u8s8_3x32__avxvnni;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_3x32__avxvnni;
    t->gemm_s8u8_group = zq_gemm_s8u8_group_3x32__avxvnni;
    t->gemm_s8u4_group = zq_gemm_s8u4_group_3x32__avxvnni;
    t->mr_u8s8 = t->mr_group = MR;
}
#else
typedef int zq_no_x86;
#endif
