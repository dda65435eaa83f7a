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

enum { MR = 4, MR_F32 = 6, MR_GROUP = 3, NV = 2, HALF = 16, KB = 1024 };

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
widen_u8(const uint8_t *a)
{
    int32_t v;
    memcpy(&v, a, 4);
    const __m256i x = _mm256_set1_epi32(v);
    return (pairs){_mm256_srli_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srli_epi16(x, 8)};
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
        const pairs x = widen_u8((const uint8_t *)t->a + i * t->lda + k);
        acc[i][0] = dot4(acc[i][0], x, w0);
        acc[i][1] = dot4(acc[i][1], x, w1);
    }
}

/* ---- W8A8 ------------------------------------------------------------------------------------------- */

/* Rows of a tile and k0 <= k < k1 as two planes each: s = a - 128 and u = |a - 128|. */
typedef struct {
    _Alignas(64) uint8_t s[MR][KB];
    _Alignas(64) uint8_t u[MR][KB];
} planes;

ZQ_INLINE void
split_row(const uint8_t *a, int64_t n, uint8_t *s, uint8_t *u)
{
    const __m256i top = _mm256_set1_epi8((char)0x80);
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
        const __m256i x = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(a + k)), top);
        _mm256_store_si256((__m256i *)(s + k), x);
        _mm256_store_si256((__m256i *)(u + k), _mm256_abs_epi8(x));
    }
    for (; k < n; k += 4) {
        int32_t v;
        memcpy(&v, a + k, 4);
        const __m128i x = _mm_xor_si128(_mm_cvtsi32_si128(v), _mm256_castsi256_si128(top));
        v = _mm_cvtsi128_si32(x);
        memcpy(s + k, &v, 4);
        v = _mm_cvtsi128_si32(_mm_abs_epi8(x));
        memcpy(u + k, &v, 4);
    }
}

ZQ_INLINE __m256i
broadcast4(const uint8_t *a)
{
    int32_t v;
    memcpy(&v, a, 4);
    return _mm256_set1_epi32(v);
}

/* c += sums over the n codes of p; b: the panel at the first of them and at this half */
ZQ_INLINE void
accumulate_s8(const int mr, const planes *p, const int8_t *b, int64_t n, int32_t (*c)[ZQ_NR])
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i acc[MR][NV];
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        acc[i][0] = load256(c[i]);
        acc[i][1] = load256(c[i] + 8);
    }
    for (int64_t k = 0; k < n; k += 4, b += ZQ_NR * 4) {
        const __m256i b0 = load256(b), b1 = load256(b + 32);
#pragma GCC unroll 4
        for (int i = 0; i < mr; i++) {
            const __m256i s = broadcast4(p->s[i] + k), u = broadcast4(p->u[i] + k);
            acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(_mm256_maddubs_epi16(u, _mm256_sign_epi8(b0, s)), ones));
            acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(_mm256_maddubs_epi16(u, _mm256_sign_epi8(b1, s)), ones));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        _mm256_store_si256((__m256i *)c[i], acc[i][0]);
        _mm256_store_si256((__m256i *)(c[i] + 8), acc[i][1]);
    }
}

/* columns of this half that exist */
ZQ_INLINE int64_t
half_width(const zq_tile *t, int half)
{
    return zq_min(t->nr - half * HALF, HALF);
}

#define ROWS4(X) X(1) X(2) X(3) X(4)
#define ACCUMULATE(n) \
    case n: accumulate_s8(n, p, b, count, c); break;

static __attribute__((noinline)) void
zq_gemm_u8s8_sums_4x16__avx2(int mr, const planes *p, const int8_t *b, int64_t count, int32_t (*c)[ZQ_NR])
{
    switch (mr) { ROWS4(ACCUMULATE) }
}

/* c = sum over k of (a - zero) * w */
ZQ_INLINE void
sums_s8(const zq_tile *t, int32_t (*c)[ZQ_NR])
{
    planes p;
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < ZQ_NR; j += 16) {
            v16i_store(c[i] + j, v16i_mul(v16i_set1(128 - t->zx[i]), v16i_load(t->colsum + j)));
        }
    }
    for (int64_t k = 0; k < t->k; k += KB) {
        const int64_t n = zq_min(KB, t->k - k);
        for (int i = 0; i < t->mr; i++) {
            split_row((const uint8_t *)t->a + i * t->lda + k, n, p.s[i], p.u[i]);
        }
        for (int half = 0; half * HALF < t->nr; half++) {
            zq_gemm_u8s8_sums_4x16__avx2(t->mr, &p, (const int8_t *)t->b + (k * ZQ_NR + half * HALF * 4), n,
                                         (int32_t(*)[ZQ_NR])(c[0] + half * HALF));
        }
    }
}

static void
zq_gemm_u8s8_4x16_tile__avx2(const zq_tile *t)
{
    _Alignas(64) int32_t c[MR][ZQ_NR];
    sums_s8(t, c);
    for (int j = 0; j < t->nr; j += 16) {
        const v16 scale = v16_load(t->scale + j), bias = v16_load(t->bias + j);
        for (int i = 0; i < t->mr; i++) {
            const v16 y = v16_mul(v16_from_i(v16i_load(c[i] + j)), v16_set1(t->sx[i]));
            v16_storen(t->y + i * t->ldy + j, v16_fma(y, scale, bias), zq_min(t->nr - j, 16));
        }
    }
}

static void
zq_gemm_u8s8_s32_4x16__avx2(const zq_tile *t, int32_t *y, int64_t ldy)
{
    _Alignas(64) int32_t c[MR][ZQ_NR];
    sums_s8(t, c);
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < t->nr; j += 16) {
            v16i_storen(y + i * ldy + j, v16i_load(c[i] + j), zq_min(t->nr - j, 16));
        }
    }
}

/* ---- groups ------------------------------------------------------------------------------------------ */

/* Integer sums of one group, started at -128 * (code sums). The int4 codes of a step are read twice: keeping both
 * nibbles of both vectors at once needs more than sixteen registers. */
ZQ_INLINE void
group_sums(const int mr, const int four_bits, const zq_tile *t, int half, int64_t g, v16i *sums)
{
    const __m256i high = _mm256_set1_epi8((char)0xf0);
    const int64_t end = zq_min(t->k, (g + 1) * t->group);
    const v16i start = v16i_load(t->colsum + g * ZQ_NR + half * HALF);
    __m256i acc[MR][NV];
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        acc[i][0] = start.lo;
        acc[i][1] = start.hi;
    }
    for (int64_t k = g * t->group; k < end; k += four_bits ? ZQ_KSTEP : 4) {
        if (four_bits) {
            const uint8_t *b = (const uint8_t *)t->b + (k / 8 * ZQ_NR + half * HALF) * 4;
            step(mr, t, k, widen_s8(_mm256_and_si256(_mm256_slli_epi16(load256(b), 4), high)),
                 widen_s8(_mm256_and_si256(_mm256_slli_epi16(load256(b + 32), 4), high)), acc);
            __asm__ volatile("" ::: "memory");
            step(mr, t, k + 4, widen_s8(_mm256_and_si256(load256(b), high)),
                 widen_s8(_mm256_and_si256(load256(b + 32), high)), acc);
        }
        else {
            const int8_t *b = (const int8_t *)t->b + (k / 4 * ZQ_NR + half * HALF) * 4;
            step(mr, t, k, widen_s8(load256(b)), widen_s8(load256(b + 32)), acc);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        sums[i] = (v16i){acc[i][0], acc[i][1]};
    }
}

#define ROWS3(X) X(1) X(2) X(3)
#define SUMS8(n) \
    case n: group_sums(n, 0, t, half, g, sums); break;
#define SUMS4(n) \
    case n: group_sums(n, 1, t, half, g, sums); break;

/* A function of its own: with the float sums of the groups beside them, the accumulators would be spilled. */
static __attribute__((noinline)) void
zq_gemm_u8s8_sums_3x16__avx2(const zq_tile *t, int half, int64_t g, v16i *sums)
{
    switch (t->mr) { ROWS3(SUMS8) }
}

static __attribute__((noinline)) void
zq_gemm_u8s4_sums_3x16__avx2(const zq_tile *t, int half, int64_t g, v16i *sums)
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
    const int64_t groups = zq_ceil_div(t->k, t->group);
    for (int64_t g = 0; g < groups; g++) {
        if (four_bits) {
            zq_gemm_u8s4_sums_3x16__avx2(t, half, g, sums);
        }
        else {
            zq_gemm_u8s8_sums_3x16__avx2(t, half, g, sums);
        }
        const v16 scale = v16_load(t->scale + g * ZQ_NR + half * HALF);
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
    v16 acc[MR_F32];
    const float *a = t->a, *b = (const float *)t->b + half * HALF;
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        acc[i] = v16_zero();
    }
    for (int64_t k = 0; k < t->k; k++, b += ZQ_NR) {
        const v16 w = v16_load(b);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
            acc[i] = v16_fma(v16_set1(a[i * t->lda + k]), w, acc[i]);
        }
    }
    const v16 bias = v16_load(t->bias + half * HALF);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        v16_storen(t->y + i * t->ldy + half * HALF, v16_add(acc[i], bias), half_width(t, half));
    }
}

#define ROWS6(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define F32(n) \
    case n: tile_f32(n, t, half); break;

static void
zq_gemm_u8s8_4x16__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_u8s8_4x16_tile__avx2);
}

static void
zq_gemm_u8s8_group_3x16_tile__avx2(const zq_tile *t)
{
    for (int half = 0; half * HALF < t->nr; half++) {
        tile_group(0, t, half);
    }
}

static void
zq_gemm_u8s8_group_3x16__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_u8s8_group_3x16_tile__avx2);
}

static void
zq_gemm_u8s4_group_3x16_tile__avx2(const zq_tile *t)
{
    for (int half = 0; half * HALF < t->nr; half++) {
        tile_group(1, t, half);
    }
}

static void
zq_gemm_u8s4_group_3x16__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_u8s4_group_3x16_tile__avx2);
}

static void
zq_gemm_f32_6x16_tile__avx2(const zq_tile *t)
{
    for (int half = 0; half * HALF < t->nr; half++) {
        switch (t->mr) { ROWS6(F32) }
    }
}

static void
zq_gemm_f32_6x16__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_f32_6x16_tile__avx2);
}

ZQ_TARGET_END

void
zq_fill_gemm__avx2(zq_kernels *t)
{
    t->gemm_u8s8 = zq_gemm_u8s8_4x16__avx2;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_4x16__avx2;
    t->gemm_u8s8_group = zq_gemm_u8s8_group_3x16__avx2;
    t->gemm_u8s4_group = zq_gemm_u8s4_group_3x16__avx2;
    t->gemm_f32 = zq_gemm_f32_6x16__avx2;
    t->mr_u8s8 = MR;
    t->mr_f32 = MR_F32;
    t->mr_group = MR_GROUP;
}
#else
typedef int zq_no_x86;
#endif
