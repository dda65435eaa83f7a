/* AVX2 tiles: 4 rows by half a panel (16 columns) at a time. No vpmaddubsw: it saturates (255 * 127 * 2 > 32767).
 * u8 and s8 codes are widened to int16 in place, even and odd positions apart, and multiplied by vpmaddwd, which
 * is exact: per four k, vector and row two vpmaddwd and two vpaddd. */
#if defined(__x86_64__)
#include "../zq_kernels.h"

#include <string.h>

ZQ_TARGET_BEGIN(ZQ_TARGET_AVX2)
#include "v16_avx2.h"

#include "v16_math.h"

#include "gemm_finish.inc.h"
#define LEVEL(name) name##__avx2
#include "group_operand.inc.h"

enum { MR = 4, MR_GROUP = 3, NV = 2, HALF = 16 };

/* Codes of one vector: (w0, w2) and (w1, w3) of each column as int16 pairs. */
typedef struct {
    __m256i even, odd;
} pairs;

ZQ_INLINE pairs
widen_s8(__m256i w)
{
    return (pairs){_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}

ZQ_INLINE pairs
widen_b8(__m256i w)
{
    return (pairs){_mm256_srli_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srli_epi16(w, 8)};
}

ZQ_INLINE __m256i
broadcast4(const uint8_t *a)
{
    int32_t v;
    memcpy(&v, a, 4);
    return _mm256_set1_epi32(v);
}

ZQ_INLINE __m256i
dot4(__m256i acc, pairs x, pairs w)
{
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x.even, w.even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(x.odd, w.odd));
}

ZQ_INLINE __m256i
load256(const void *p)
{
    return _mm256_load_si256((const __m256i *)p);
}

ZQ_INLINE void
step(const int mr, const zq_tile *t, int64_t k, pairs w0, pairs w1, __m256i acc[MR][NV])
{
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        const pairs x = widen_b8(broadcast4((const uint8_t *)t->a + i * t->lda + k));
        acc[i][0] = dot4(acc[i][0], x, w0);
        acc[i][1] = dot4(acc[i][1], x, w1);
    }
}

ZQ_INLINE void
accumulate_s8(const int mr, const zq_tile *t, int half, __m256i acc[MR][NV])
{
    const int8_t *b = (const int8_t *)t->b + half * HALF * 4;
    for (int64_t k = 0; k < t->k; k += 4, b += ZQ_NR * 4) {
        step(mr, t, k, widen_s8(load256(b)), widen_s8(load256(b + 32)), acc);
    }
}

ZQ_INLINE void
start_s8(const int mr, const zq_tile *t, int half, __m256i acc[MR][NV])
{
    const v16i sums = v16i_load(t->colsum + half * HALF);
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        const v16i z = v16i_mul(v16i_set1(-t->zx[i]), sums);
        acc[i][0] = z.lo;
        acc[i][1] = z.hi;
    }
}

/* columns of this half that exist */
ZQ_INLINE int64_t
half_width(const zq_tile *t, int half)
{
    return zq_min(t->nr - half * HALF, HALF);
}

ZQ_INLINE void
tile_s8(const int mr, const zq_tile *t, int half)
{
    __m256i acc[MR][NV];
    start_s8(mr, t, half, acc);
    accumulate_s8(mr, t, half, acc);
    const v16 scale = v16_load(t->scale + half * HALF), bias = v16_load(t->bias + half * HALF);
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        const v16 y = v16_mul(v16_from_i((v16i){acc[i][0], acc[i][1]}), v16_set1(t->sx[i]));
        v16_storen(t->y + i * t->ldy + half * HALF, v16_fma(y, scale, bias), half_width(t, half));
    }
}

ZQ_INLINE void
tile_s8_s32(const int mr, const zq_tile *t, int half, int32_t *c, int64_t ldc)
{
    __m256i acc[MR][NV];
    start_s8(mr, t, half, acc);
    accumulate_s8(mr, t, half, acc);
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        v16i_storen(c + i * ldc + half * HALF, (v16i){acc[i][0], acc[i][1]}, half_width(t, half));
    }
}

/* Four deep: signed activations times the unsigned codes w of both vectors, which are widened. */
ZQ_INLINE void
step_u8(const int mr, const zq_tile *t, int64_t k, const uint8_t *b, v16i *sums)
{
    const pairs w0 = widen_b8(load256(b)), w1 = widen_b8(load256(b + 32));
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        const pairs x = widen_s8(broadcast4((const uint8_t *)t->a + i * t->lda + k));
        sums[i].lo = dot4(sums[i].lo, x, w0);
        sums[i].hi = dot4(sums[i].hi, x, w1);
    }
}

/* vpmaddubsw is exact here: 15 * 128 * 2 = 3840, and eight of these fit into int16. So: up to 32 k into int16, then vpmaddwd by
 * ones into int32. The codes of a step are read twice: keeping both nibbles of both vectors needs too many registers. */
ZQ_INLINE void
chunk_u4(const int mr, const zq_tile *t, int64_t k, int64_t end, const uint8_t *b, v16i *sums)
{
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i acc[MR_GROUP][NV];
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        acc[i][0] = acc[i][1] = _mm256_setzero_si256();
    }
    for (; k < end; k += ZQ_KSTEP, b += ZQ_NR * 4) {
        for (int high = 0; high < 2; high++) {
            const __m256i w0 = _mm256_and_si256(_mm256_srli_epi16(load256(b), 4 * high), low);
            const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(load256(b + 32), 4 * high), low);
#pragma GCC unroll 4
            for (int i = 0; i < mr; i++) {
                const __m256i x = broadcast4((const uint8_t *)t->a + i * t->lda + k + 4 * high);
                acc[i][0] = _mm256_add_epi16(acc[i][0], _mm256_maddubs_epi16(w0, x));
                acc[i][1] = _mm256_add_epi16(acc[i][1], _mm256_maddubs_epi16(w1, x));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        sums[i].lo = _mm256_add_epi32(sums[i].lo, _mm256_madd_epi16(acc[i][0], ones));
        sums[i].hi = _mm256_add_epi32(sums[i].hi, _mm256_madd_epi16(acc[i][1], ones));
    }
}

/* Integer sums of one group; b are its codes, of the left or right half. */
ZQ_INLINE void
group_sums(const int mr, const int four_bits, const zq_tile *t, int64_t g, const uint8_t *b, v16i *sums)
{
    const int64_t end = zq_min(t->k, (g + 1) * t->group), deep = four_bits ? 32 : 4;
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        sums[i] = v16i_set1(t->start[i * t->ld_start + g]);
    }
    for (int64_t k = g * t->group; k < end; k += deep, b += four_bits ? 16 * ZQ_NR : 4 * ZQ_NR) {
        if (four_bits) {
            chunk_u4(mr, t, k, zq_min(k + deep, end), b, sums);
        }
        else {
            step_u8(mr, t, k, b, sums);
        }
    }
}

#define ROWS4(X) X(1) X(2) X(3) X(4)
#define ROWS3(X) X(1) X(2) X(3)
#define SUMS8(n) \
    case n: group_sums(n, 0, t, g, b, sums); break;
#define SUMS4(n) \
    case n: group_sums(n, 1, t, g, b, sums); break;

/* A function of its own: with the float sums of the groups beside them, the accumulators would be spilled. */
static __attribute__((noinline)) void
zq_gemm_s8u8_sums_3x16__avx2(const zq_tile *t, int64_t g, const uint8_t *b, v16i *sums)
{
    switch (t->mr) { ROWS3(SUMS8) }
}

static __attribute__((noinline)) void
zq_gemm_s8u4_sums_3x16__avx2(const zq_tile *t, int64_t g, const uint8_t *b, v16i *sums)
{
    switch (t->mr) { ROWS3(SUMS4) }
}

ZQ_INLINE void
tile_group(const int four_bits, const zq_tile *t, int half)
{
    v16 f[MR];
    v16i sums[MR];
    for (int i = 0; i < t->mr; i++) {
        f[i] = v16_zero();
    }
    const int64_t groups = zq_ceil_div(t->k, t->group), bytes = ZQ_NR * (4 + (four_bits ? t->group / 2 : t->group));
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *b = (const uint8_t *)t->b + g * bytes;
        const v16 scale = v16_load((const float *)b + half * HALF);
        b += 4 * ZQ_NR + half * HALF * 4;
        if (four_bits) {
            zq_gemm_s8u4_sums_3x16__avx2(t, g, b, sums);
        }
        else {
            zq_gemm_s8u8_sums_3x16__avx2(t, g, b, sums);
        }
        for (int i = 0; i < t->mr; i++) {
            f[i] = v16_fma(v16_from_i(sums[i]), scale, f[i]);
        }
    }
    const v16 zcorr = v16_load(t->zcorr + half * HALF), bias = v16_load(t->bias + half * HALF);
    for (int i = 0; i < t->mr; i++) {
        const v16 y = v16_fnma(v16_set1((float)(t->zx[i] - 128)), zcorr, f[i]);
        v16_storen(t->y + i * t->ldy + half * HALF, v16_fma(y, v16_set1(t->sx[i]), bias), half_width(t, half));
    }
}

ZQ_INLINE void
tile_f32(const int mr, const zq_tile *t, int half)
{
    v16 acc[MR];
    const float *a = t->a, *b = (const float *)t->b + half * HALF;
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        acc[i] = v16_zero();
    }
    for (int64_t k = 0; k < t->k; k++, b += ZQ_NR) {
        const v16 w = v16_load(b);
#pragma GCC unroll 4
        for (int i = 0; i < mr; i++) {
            acc[i] = v16_fma(v16_set1(a[i * t->lda + k]), w, acc[i]);
        }
    }
    const v16 bias = v16_load(t->bias + half * HALF);
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        v16_storen(t->y + i * t->ldy + half * HALF, v16_add(acc[i], bias), half_width(t, half));
    }
}

#define S8(n) \
    case n: tile_s8(n, t, half); break;
#define S32(n) \
    case n: tile_s8_s32(n, t, half, c, ldc); break;
#define F32(n) \
    case n: tile_f32(n, t, half); break;

static void
zq_gemm_u8s8_4x16_tile__avx2(const zq_tile *t)
{
    for (int half = 0; half * HALF < t->nr; half++) {
        switch (t->mr) { ROWS4(S8) }
    }
}

static void
zq_gemm_u8s8_4x16__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_u8s8_4x16_tile__avx2);
}

static void
zq_gemm_u8s8_s32_4x16__avx2(const zq_tile *t, int32_t *c, int64_t ldc)
{
    for (int half = 0; half * HALF < t->nr; half++) {
        switch (t->mr) { ROWS4(S32) }
    }
}

static void
zq_gemm_s8u8_group_3x16_tile__avx2(const zq_tile *t)
{
    for (int half = 0; half * HALF < t->nr; half++) {
        tile_group(0, t, half);
    }
}

static void
zq_gemm_s8u8_group_3x16__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_s8u8_group_3x16_tile__avx2);
}

static void
zq_gemm_s8u4_group_3x16_tile__avx2(const zq_tile *t)
{
    for (int half = 0; half * HALF < t->nr; half++) {
        tile_group(1, t, half);
    }
}

static void
zq_gemm_s8u4_group_3x16__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_s8u4_group_3x16_tile__avx2);
}

static void
zq_gemm_f32_4x16_tile__avx2(const zq_tile *t)
{
    for (int half = 0; half * HALF < t->nr; half++) {
        switch (t->mr) { ROWS4(F32) }
    }
}

static void
zq_gemm_f32_4x16__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_f32_4x16_tile__avx2);
}

ZQ_TARGET_END

void
zq_fill_gemm__avx2(zq_kernels *t)
{
    t->gemm_u8s8 = zq_gemm_u8s8_4x16__avx2;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_4x16__avx2;
    t->gemm_s8u8_group = zq_gemm_s8u8_group_3x16__avx2;
    t->gemm_s8u4_group = zq_gemm_s8u4_group_3x16__avx2;
    t->center_groups_b8 = center_groups_b8__avx2;
    t->gemm_f32 = zq_gemm_f32_4x16__avx2;
    t->mr_u8s8 = t->mr_f32 = MR;
    t->mr_group = MR_GROUP;
}
#else
typedef int zq_no_x86;
#endif
