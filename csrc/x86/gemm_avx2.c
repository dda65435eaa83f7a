/* AVX2 tiles. vpmaddubsw multiplies u8 by s8 and adds two products into int16, where it saturates: 2 * 255 * 127 > 32767.
 * W8A8 therefore moves the sign over: with s = a - 128,
 *
 *     a * w = s * w + 128 * w = |s| * (sign(s) * w) + 128 * w,
 *
 * |s| <= 128 is a u8 and |sign(s) * w| <= 127 an s8 (codes are never -128: pack.c), so that a pair of products is at most
 * 2 * 128 * 127 = 32512: exact. 128 * sum of w goes into the start of the sums, with the zero point.
 *
 * The bound. Per 32 products: vpsignb, vpmaddubsw, vpmaddwd by ones (pairs to int32), vpaddd. Widening both sides to int16
 * costs the same (2 vpmaddwd + 2 vpaddd) and the widening on top. Zen 4 and 5 have four vector pipes, two of which multiply:
 * four such instructions a cycle, 32 products or 64 operations; a loop of either sequence from registers reaches 87 to
 * 89 % of that on Zen 5 (tests/bench/ceilings.c), as additions are sometimes sent to the pipes that multiply. That loop is
 * the ceiling that bench_gemm.py refers to. */
#if defined(__x86_64__)
#include "../zq_kernels.h"

#include <string.h>

ZQ_TARGET_BEGIN(ZQ_TARGET_AVX2)
#include "v16_avx2.h"

#include "v16_math.h"

#include "gemm_finish.inc.h"

#include "gemm_256.inc.h"

enum { MR_GROUP = 3, NV_GROUP = 2, HALF = 16, KB = 1024 };

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

/* acc + sum of s * w over four codes: the equation at the top without its last term */
ZQ_INLINE __m256i
dot4_signs(__m256i acc, __m256i s, __m256i u, __m256i w)
{
    const __m256i pairs_of_k = _mm256_maddubs_epi16(u, _mm256_sign_epi8(w, s));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs_of_k, _mm256_set1_epi16(1)));
}

/* c (mr, ZQ_NR) += sums over the n codes of p; b: the panel at the first of them */
ZQ_INLINE void
accumulate_s8(const int mr, const int far, const zq_tile *t, const planes *p, const int8_t *b, int64_t n, int32_t *c)
{
    __m256i acc[MR][NV];
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            acc[i][v] = load256(c + i * ZQ_NR + 8 * v);
        }
    }
    for (int64_t k = 0; k < n; k += 4, b += ZQ_NR * 4) {
        prefetch_ahead(far, t, b);
#pragma GCC unroll 3
        for (int i = 0; i < mr; i++) {
            const __m256i s = broadcast4(p->s[i] + k), u = broadcast4(p->u[i] + k);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                acc[i][v] = dot4_signs(acc[i][v], s, u, load256(b + 32 * v));
            }
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            _mm256_store_si256((__m256i *)(c + i * ZQ_NR + 8 * v), acc[i][v]);
        }
    }
}

#define SUMS(n) \
    case n: accumulate_s8(n, 0, t, p, b, count, c); break;
#define SUMS_FAR(n) \
    case n: accumulate_s8(n, 1, t, p, b, count, c); break;

/* A function of its own: what is live around the loop would push accumulators out of their registers. */
static __attribute__((noinline)) void
zq_gemm_u8s8_sums_3x32__avx2(const zq_tile *t, const planes *p, const int8_t *b, int64_t count, int32_t *c)
{
    NEAR_OR_FAR(ROWS3, SUMS)
}

/* c (mr, ZQ_NR) = sum over k of (a - zero) * w */
ZQ_INLINE void
sums_s8(const zq_tile *t, int32_t *c)
{
    planes p;
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < ZQ_NR; j += 16) {
            v16i_store(c + i * ZQ_NR + j, v16i_mul(v16i_set1(128 - t->zx[i]), v16i_load(t->colsum + j)));
        }
    }
    for (int64_t k = 0; k < t->k; k += KB) {
        const int64_t n = zq_min(KB, t->k - k);
        for (int i = 0; i < t->mr; i++) {
            split_row((const uint8_t *)t->a + i * t->lda + k, n, p.s[i], p.u[i]);
        }
        zq_gemm_u8s8_sums_3x32__avx2(t, &p, (const int8_t *)t->b + k * ZQ_NR, n, c);
    }
}

static void
zq_gemm_u8s8_3x32_tile__avx2(const zq_tile *t)
{
    _Alignas(64) int32_t c[MR * ZQ_NR];
    sums_s8(t, c);
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < ZQ_NR; j += 16) {
            store_scaled16(t, i, j, v16i_load(c + i * ZQ_NR + j));
        }
    }
}

static void
zq_gemm_u8s8_s32_3x32__avx2(const zq_tile *t, int32_t *y, int64_t ldy)
{
    _Alignas(64) int32_t c[MR * ZQ_NR];
    sums_s8(t, c);
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < ZQ_NR; j += 16) {
            store_s32(t, y + i * ldy, j, v16i_load(c + i * ZQ_NR + j));
        }
    }
}

/* ---- groups ------------------------------------------------------------------------------------------ */

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

ZQ_INLINE void
step(const int mr, const zq_tile *t, int64_t k, pairs w0, pairs w1, __m256i acc[MR_GROUP][NV_GROUP])
{
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        const pairs x = widen_u8((const uint8_t *)t->a + i * t->lda + k);
        acc[i][0] = dot4(acc[i][0], x, w0);
        acc[i][1] = dot4(acc[i][1], x, w1);
    }
}

/* Integer sums of one group, started at -128 * (code sums). The int4 codes of a step are read twice: keeping both
 * nibbles of both vectors at once needs more than sixteen registers. */
ZQ_INLINE void
group_sums(const int mr, const int four_bits, const zq_tile *t, int half, int64_t g, v16i *sums)
{
    const __m256i high = _mm256_set1_epi8((char)0xf0);
    const int64_t end = zq_min(t->k, (g + 1) * t->group);
    const v16i start = v16i_load(t->colsum + g * ZQ_NR + half * HALF);
    __m256i acc[MR_GROUP][NV_GROUP];
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
    v16 f[MR_GROUP];
    v16i sums[MR_GROUP];
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
        store16(t, i, half * HALF, v16_fma(y, v16_set1(t->sx[i]), bias));
    }
}

/* ---- float32 ---------------------------------------------------------------------------------------- */

ZQ_INLINE void
tile_f32(const int mr, const int far, const zq_tile *t)
{
    v16 acc[MR][2];
    const float *a = t->a, *b = t->b;
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        acc[i][0] = acc[i][1] = v16_zero();
    }
    for (int64_t k = 0; k < t->k; k++, b += ZQ_NR) {
        const v16 w0 = v16_load(b), w1 = v16_load(b + 16);
        prefetch_ahead(far, t, b);
#pragma GCC unroll 3
        for (int i = 0; i < mr; i++) {
            const v16 x = v16_set1(a[i * t->lda + k]);
            acc[i][0] = v16_fma(x, w0, acc[i][0]);
            acc[i][1] = v16_fma(x, w1, acc[i][1]);
        }
    }
    const v16 bias0 = v16_load(t->bias), bias1 = v16_load(t->bias + 16);
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        store16(t, i, 0, v16_add(acc[i][0], bias0));
        store16(t, i, 16, v16_add(acc[i][1], bias1));
    }
}

#define F32(n) \
    case n: tile_f32(n, 0, t); break;
#define F32_FAR(n) \
    case n: tile_f32(n, 1, t); break;

static void
zq_gemm_u8s8_3x32__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_u8s8_3x32_tile__avx2);
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
zq_gemm_f32_3x32_tile__avx2(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS3, F32)
}

static void
zq_gemm_f32_3x32__avx2(const zq_tile *t)
{
    run_tile(t, zq_gemm_f32_3x32_tile__avx2);
}

ZQ_TARGET_END

void
zq_fill_gemm__avx2(zq_kernels *t)
{
    t->gemm_u8s8 = zq_gemm_u8s8_3x32__avx2;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_3x32__avx2;
    t->gemm_u8s8_group = zq_gemm_u8s8_group_3x16__avx2;
    t->gemm_u8s4_group = zq_gemm_u8s4_group_3x16__avx2;
    t->gemm_f32 = zq_gemm_f32_3x32__avx2;
    t->mr_u8s8 = t->mr_f32 = MR;
    t->mr_group = MR_GROUP;
}
#else
typedef int zq_no_x86;
#endif
