/* Level avxvnni: W8A8 tiles with the 256-bit, VEX-encoded vpdpbusd (client CPUs without AVX-512). What is not here is
 * level avx2's.
 *
 * The bound: Zen 5 starts two vpdpbusd a cycle at either width, so that this level has half of avx512vnni's peak. Latency
 * 4: eight chains and more keep both pipes busy, three rows have twelve. With groups of 32, 64, 128 one more slot of these
 * pipes in every 9, 17, 33 multiplies by the scale: 89, 94, 97 % (tests/bench/ceilings.c measures that). */
#if defined(__x86_64__)
#include "../zq_kernels.h"

#include <string.h>

ZQ_TARGET_BEGIN(ZQ_TARGET_AVXVNNI)
#include "v16_avx2.h"

#include "v16_math.h"

#include "gemm_finish.inc.h"

#include "gemm_256.inc.h"

/* Four codes of each row, at a, times the 128 bytes of the panel at b */
ZQ_INLINE void
step_s8(const int mr, const int far, const zq_tile *t, const uint8_t *a, const int8_t *b, __m256i acc[MR][NV])
{
    prefetch_ahead(far, t, b);
    ZQ_UNROLL(3)
    for (int i = 0; i < mr; i++) {
        const __m256i x = broadcast4(a + i * t->lda);
#if defined(__clang__) /* the sums and x take all registers but three: clang 14 keeps four of b for the next row, and spills */
        __asm__("" : "+r"(b));
#endif
        ZQ_UNROLL(4)
        for (int v = 0; v < NV; v++) {
            acc[i][v] = _mm256_dpbusd_avx_epi32(acc[i][v], x, load256(b + 32 * v));
        }
    }
}

/* One row, two steps at a time into accumulators of their own: four chains would be too slow. Returns where a last single step
 * begins. */
ZQ_INLINE int64_t
accumulate_one_s8(const int far, const zq_tile *t, __m256i acc[MR][NV])
{
    const __m256i none = _mm256_setzero_si256();
    __m256i second[MR][NV] = {{none, none, none, none}};
    const uint8_t *a = t->a;
    const int8_t *b = t->b;
    int64_t k = 0;
    for (; k + 8 <= t->k; k += 8, b += ZQ_NR * 8) {
        step_s8(1, far, t, a + k, b, acc);
        step_s8(1, far, t, a + k + 4, b + ZQ_NR * 4, second);
    }
    ZQ_UNROLL(4)
    for (int v = 0; v < NV; v++) {
        acc[0][v] = _mm256_add_epi32(acc[0][v], second[0][v]);
    }
    return k;
}

/* acc[i][v] = sum over k of (a[i][k] - zero[i]) * b[k][8 v + lane] */
ZQ_INLINE void
accumulate_s8(const int mr, const int far, const zq_tile *t, __m256i acc[MR][NV])
{
    const uint8_t *a = t->a;
    const int8_t *b = t->b;
    ZQ_UNROLL(3)
    for (int i = 0; i < mr; i++) {
        const __m256i z = _mm256_set1_epi32(-t->zx[i]);
        ZQ_UNROLL(4)
        for (int v = 0; v < NV; v++) {
            acc[i][v] = _mm256_mullo_epi32(z, _mm256_loadu_si256((const __m256i *)(t->colsum + 8 * v)));
        }
    }
    int64_t k = 0;
    if (mr == 1) {
        k = accumulate_one_s8(far, t, acc);
        b += ZQ_NR * k;
    }
    for (; k < t->k; k += 4, b += ZQ_NR * 4) {
        step_s8(mr, far, t, a + k, b, acc);
    }
}

ZQ_INLINE void
tile_s8(const int mr, const int far, const zq_tile *t)
{
    __m256i acc[MR][NV];
    accumulate_s8(mr, far, t, acc);
    ZQ_UNROLL(3)
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
    ZQ_UNROLL(3)
    for (int i = 0; i < mr; i++) {
        store_s32(t, c + i * ldc, 0, (v16i){acc[i][0], acc[i][1]});
        store_s32(t, c + i * ldc, 16, (v16i){acc[i][2], acc[i][3]});
    }
}

/* Vectors of a panel that a group is done for at a time: half of them with more than three rows (gemm_256.inc.h). With less
 * a chain of dot products alone would be too slow. */
#define WIDTH(mr) ((mr) > 3 ? 2 : NV)

/* Four deep: unsigned codes, of four bits in the low or the high nibbles or of eight, times signed activations. What there is
 * less of stays in registers: the codes, or up to three rows' activations. */
ZQ_INLINE void
step_low(const int mr, const int four_bits, const int high, const uint8_t *a, int64_t lda, const uint8_t *b,
         __m256i acc[MR_GROUP][NV])
{
    __m256i x[MR];
    ZQ_UNROLL(3)
    for (int i = 0; i < mr; i++) {
        x[i] = broadcast4(a + i * lda);
    }
    ZQ_UNROLL(4)
    for (int v = 0; v < NV; v++) {
        const __m256i w = four_bits ? nibbles(b + 32 * v, high) : load256(b + 32 * v);
        ZQ_UNROLL(3)
        for (int i = 0; i < mr; i++) {
            acc[i][v] = _mm256_dpbusd_avx_epi32(acc[i][v], w, x[i]);
        }
    }
}

ZQ_INLINE void
step_high(const int mr, const int four_bits, const int high, const uint8_t *a, int64_t lda, const uint8_t *b,
          __m256i acc[MR_GROUP][NV])
{
    const __m256i w0 = four_bits ? nibbles(b, high) : load256(b), w1 = four_bits ? nibbles(b + 32, high) : load256(b + 32);
    ZQ_UNROLL(6)
    for (int i = 0; i < mr; i++) {
        const __m256i x = broadcast4(a + i * lda);
        acc[i][0] = _mm256_dpbusd_avx_epi32(acc[i][0], w0, x);
        acc[i][1] = _mm256_dpbusd_avx_epi32(acc[i][1], w1, x);
    }
}

ZQ_INLINE void
step_group(const int mr, const int four_bits, const int high, const uint8_t *a, int64_t lda, const uint8_t *b,
           __m256i acc[MR_GROUP][NV])
{
    if (WIDTH(mr) < NV) {
        step_high(mr, four_bits, high, a, lda, b, acc);
    }
    else {
        step_low(mr, four_bits, high, a, lda, b, acc);
    }
    leave_registers(b);
}

/* What lies at b and is read next: half a panel's line, or with all columns at a time a whole panel's two. */
ZQ_INLINE void
prefetch_step(const int mr, const int far, const zq_tile *t, const uint8_t *b)
{
    prefetch_half(far, t, b);
    if (WIDTH(mr) == NV) {
        prefetch_half(far, t, b + 64);
    }
}

/* acc += the n codes of one group, at b, times activations. */
ZQ_INLINE void
accumulate_group(const int mr, const int four_bits, const int far, const zq_tile *t, const uint8_t *a, int64_t n,
                 const uint8_t *b, __m256i acc[MR_GROUP][NV])
{
    const int64_t lda = t->lda;
    for (; n > 0; n -= ZQ_KSTEP, a += ZQ_KSTEP, b += ZQ_NR * 4) {
        prefetch_step(mr, far, t, b);
        step_group(mr, four_bits, 0, a, lda, b, acc);
        if (!four_bits) {
            b += ZQ_NR * 4;
            prefetch_step(mr, far, t, b);
        }
        step_group(mr, four_bits, four_bits, a + 4, lda, b, acc);
    }
}

/* f += a group's sums times its scales, for vectors at, at + 1 .. of the panel. f stays in memory: the integer sums take the
 * registers. */
ZQ_INLINE void
add_group(const int mr, const int four_bits, const int far, const zq_tile *t, const uint8_t *a, const int32_t *start,
          int64_t n, const uint8_t *panel, const int at, __m256 f[MR_GROUP][NV])
{
    const int width = WIDTH(mr);
    __m256i acc[MR_GROUP][NV];
    ZQ_UNROLL(6)
    for (int i = 0; i < mr; i++) {
        ZQ_UNROLL(4)
        for (int v = 0; v < width; v++) {
            acc[i][v] = _mm256_set1_epi32(start[i * t->ld_start]);
        }
    }
    leave_registers(f);
    accumulate_group(mr, four_bits, far, t, a, n, panel + 4 * ZQ_NR + 32 * at, acc);
    leave_registers(f);
    ZQ_UNROLL(6)
    for (int i = 0; i < mr; i++) {
        ZQ_UNROLL(4)
        for (int v = 0; v < width; v++) {
            const __m256 scale = _mm256_load_ps((const float *)panel + 8 * (at + v));
            f[i][at + v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i][v]), scale, f[i][at + v]);
        }
    }
}

ZQ_INLINE void
tile_group(const int mr, const int four_bits, const int far, const zq_tile *t)
{
    __m256 f[MR_GROUP][NV];
    const int64_t bytes = ZQ_NR * (4 + (four_bits ? t->group / 2 : t->group));
    const uint8_t *panel = t->b, *a = t->a;
    const int32_t *start = t->start;
    for (int i = 0; i < mr; i++) {
        f[i][0] = f[i][1] = f[i][2] = f[i][3] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < t->k; k += t->group, a += t->group, panel += bytes, start++) {
        const int64_t n = zq_min(t->group, t->k - k);
        prefetch_group(far, t, panel, bytes);
        add_group(mr, four_bits, far, t, a, start, n, panel, 0, f);
        if (WIDTH(mr) < NV) {
            add_group(mr, four_bits, far, t, a, start, n, panel, 2, f);
        }
    }
    for (int i = 0; i < mr; i++) {
        store_group16(t, i, 0, (v16){f[i][0], f[i][1]});
        store_group16(t, i, 16, (v16){f[i][2], f[i][3]});
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
zq_gemm_s8u8_group_6x16_tile__avxvnni(const zq_tile *t)
{
    NEAR_OR_FAR_OR_MEMORY(ROWS6, ROWS3, 3, G8)
}

static void
zq_gemm_s8u8_group_6x16__avxvnni(zq_tile *t)
{
    run_tile(t, zq_gemm_s8u8_group_6x16_tile__avxvnni);
}

static void
zq_gemm_s8u4_group_6x16_tile__avxvnni(const zq_tile *t)
{
    NEAR_OR_FAR_OR_MEMORY(ROWS6, ROWS3, 3, G4)
}

static void
zq_gemm_s8u4_group_6x16__avxvnni(zq_tile *t)
{
    run_tile(t, zq_gemm_s8u4_group_6x16_tile__avxvnni);
}

static void
zq_gemm_u8s8_3x32_tile__avxvnni(const zq_tile *t)
{
    NEAR_OR_FAR_OR_MEMORY(ROWS3, ROWS3, 3, S8)
}

static void
zq_gemm_u8s8_3x32__avxvnni(zq_tile *t)
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
    t->gemm_s8u8_group = zq_gemm_s8u8_group_6x16__avxvnni;
    t->gemm_s8u4_group = zq_gemm_s8u4_group_6x16__avxvnni;
    t->mr_u8s8 = MR;
    t->mr_group = MR_GROUP;
}
#else
typedef int zq_no_x86;
#endif
