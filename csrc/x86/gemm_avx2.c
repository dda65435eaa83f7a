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
 * the ceiling that bench_kernels.py refers to. */
#if defined(__x86_64__)
#include "../zq_kernels.h"

#include <string.h>

ZQ_TARGET_BEGIN(ZQ_TARGET_AVX2)
#include "v16_avx2.h"

#include "v16_math.h"

#include "gemm_finish.inc.h"
#define LEVEL(name) name##__avx2
#include "group_operand.inc.h"

#include "gemm_256.inc.h"

enum { KB = 1024 };

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
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) {
            acc[i][v] = load256(c + i * ZQ_NR + 8 * v);
        }
    }
    for (int64_t k = 0; k < n; k += 4, b += ZQ_NR * 4) {
        prefetch_ahead(far, t, b);
#pragma GCC unroll 3
        for (int i = 0; i < mr; i++) {
            const __m256i s = broadcast4(p->s[i] + k), u = broadcast4(p->u[i] + k);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) {
                acc[i][v] = dot4_signs(acc[i][v], s, u, load256(b + 32 * v));
            }
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) {
            _mm256_store_si256((__m256i *)(c + i * ZQ_NR + 8 * v), acc[i][v]);
        }
    }
}

#define SUMS(n, far) \
    case n: accumulate_s8(n, far, t, p, b, count, c); break;

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

static const _Alignas(32) int16_t ones[16] = X16(1);

/* ---- groups ------------------------------------------------------------------------------------------ */

/* Four deep: one nibble of 16 columns' codes times activations, into int16. */
ZQ_INLINE void
step_u4(const int mr, const int first, const int high, int64_t lda, const uint8_t *a, const uint8_t *b,
        __m256i acc[MR_GROUP][2])
{
    const __m256i w0 = nibbles(b, high), w1 = nibbles(b + 32, high);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        const __m256i x = broadcast4(a + i * lda + 4 * high);
        const __m256i p0 = _mm256_maddubs_epi16(w0, x), p1 = _mm256_maddubs_epi16(w1, x);
        acc[i][0] = first ? p0 : _mm256_add_epi16(acc[i][0], p0);
        acc[i][1] = first ? p1 : _mm256_add_epi16(acc[i][1], p1);
        /* gcc would add the products of both nibbles first, and keep all of the first nibbles' meanwhile */
        __asm__("" : "+x"(acc[i][0]), "+x"(acc[i][1]));
    }
    leave_registers(b);
}

/* 16 products deep in int16: vpmaddubsw is exact for codes of four bits, 15 * 128 * 2 = 3840, and eight of these fit. So: up
 * to 32 k (`steps` of 8) into int16, then vpmaddwd by ones and an addition to the sums: the sequence that bench_kernels.py
 * takes as the ceiling. The chunk as assembly, without gcc's copies, and codes unpacked once for 12 rows were no faster. */
ZQ_INLINE void
chunk_u4(const int mr, const int far, const zq_tile *t, const uint8_t *a, int64_t steps, const uint8_t *b,
         __m256i acc[MR_GROUP][2])
{
    prefetch_half(far, t, b);
    step_u4(mr, 1, 0, t->lda, a, b, acc);
    step_u4(mr, 0, 1, t->lda, a, b, acc);
#pragma GCC unroll 1
    while (--steps > 0) {
        a += ZQ_KSTEP;
        b += ZQ_NR * 4;
        prefetch_half(far, t, b);
        step_u4(mr, 0, 0, t->lda, a, b, acc);
        step_u4(mr, 0, 1, t->lda, a, b, acc);
    }
}

/* Row i's sums of a chunk added to those of the chunks before it; the first chunk of a group starts at t->start. */
ZQ_INLINE v16i
widen_u4(const int first, const zq_tile *t, const int32_t *start, const v16i *sums, int i, __m256i acc[MR_GROUP][2])
{
    const v16i before = first ? v16i_set1(start[i * t->ld_start]) : sums[i];
    return (v16i){_mm256_add_epi32(before.lo, _mm256_madd_epi16(acc[i][0], constant16(ones))),
                  _mm256_add_epi32(before.hi, _mm256_madd_epi16(acc[i][1], constant16(ones)))};
}

ZQ_INLINE void
keep_sums(const int mr, const int first, const zq_tile *t, const int32_t *start, __m256i acc[MR_GROUP][2], v16i *sums)
{
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        sums[i] = widen_u4(first, t, start, sums, i, acc);
    }
    leave_registers(sums);
}

/* f = fma(sum of the group, scale, f) */
ZQ_INLINE void
finish_sums(const int mr, const int first, const zq_tile *t, const int32_t *start, __m256i acc[MR_GROUP][2],
            const v16i *sums, const float *scales, v16 *f)
{
    const v16 scale = v16_load(scales);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        f[i] = v16_fma(v16_from_i(widen_u4(first, t, start, sums, i, acc)), scale, f[i]);
    }
    leave_registers(f);
}

/* One group of 16 columns, n codes at b. Its sums lie in memory between two chunks: int16 takes the registers. */
ZQ_INLINE void
group_u4(const int mr, const int far, const zq_tile *t, const uint8_t *a, const int32_t *start, int64_t n, const uint8_t *b,
         const float *scales, v16 *f)
{
    v16i sums[MR_GROUP];
    __m256i acc[MR_GROUP][2];
    if (n > 32) {
        chunk_u4(mr, far, t, a, 4, b, acc);
        keep_sums(mr, 1, t, start, acc, sums);
        for (n -= 32, a += 32, b += 512; n > 32; n -= 32, a += 32, b += 512) {
            chunk_u4(mr, far, t, a, 4, b, acc);
            keep_sums(mr, 0, t, start, acc, sums);
        }
        chunk_u4(mr, far, t, a, n / ZQ_KSTEP, b, acc);
        finish_sums(mr, 0, t, start, acc, sums, scales, f);
    }
    else {
        chunk_u4(mr, far, t, a, n / ZQ_KSTEP, b, acc);
        finish_sums(mr, 1, t, start, acc, sums, scales, f);
    }
}

/* f = fma(sum of a group, its scale, f) over the groups */
ZQ_INLINE void
tile_u4(const int mr, const int far, const zq_tile *t)
{
    v16 f[2][MR_GROUP];
    const uint8_t *panel = t->b, *a = t->a;
    const int32_t *start = t->start;
    for (int i = 0; i < mr; i++) {
        f[0][i] = f[1][i] = v16_zero();
    }
    for (int64_t k = 0; k < t->k; k += t->group, start++) {
        const uint8_t *b = panel + 4 * ZQ_NR;
        const int64_t n = zq_min(t->group, t->k - k);
        prefetch_group(far, t, panel, 4 * ZQ_NR + n * 16);
        for (int half = 0; half < 2; half++) {
            group_u4(mr, far, t, a, start, n, b + 64 * half, (const float *)panel + 16 * half, f[half]);
        }
        a += n;
        panel = b + n * 16;
    }
    for (int i = 0; i < mr; i++) {
        store_group16(t, i, 0, f[0][i]);
        store_group16(t, i, 16, f[1][i]);
    }
}

/* Codes of eight bits, by signs as above; they are made signed again, so that the sums start at 0. */
ZQ_INLINE void
group_u8(const int mr, int64_t lda, const uint8_t *a, int64_t n, const uint8_t *b, v16i *out)
{
    const __m256i top = _mm256_set1_epi8((char)0x80);
    v16i sums[MR];
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        sums[i] = out[i];
    }
    for (; n > 0; n -= 4, a += 4, b += ZQ_NR * 4) {
        const __m256i w0 = _mm256_xor_si256(load256(b), top), w1 = _mm256_xor_si256(load256(b + 32), top);
#pragma GCC unroll 3
        for (int i = 0; i < mr; i++) {
            const __m256i s = broadcast4(a + i * lda), u = _mm256_abs_epi8(s);
            sums[i].lo = dot4_signs(sums[i].lo, s, u, w0);
            sums[i].hi = dot4_signs(sums[i].hi, s, u, w1);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < mr; i++) {
        out[i] = sums[i];
    }
}

#define SUMS8(n, far) \
    case n: group_u8(n, lda, a, count, b, sums); break;
#define G4(n, far) \
    case n: tile_u4(n, far, t); break;

/* A function of its own: with the float sums of the groups beside them, the accumulators would be spilled. */
static __attribute__((noinline)) void
zq_gemm_s8u8_sums_3x16__avx2(int mr, int64_t lda, const uint8_t *a, int64_t count, const uint8_t *b, v16i *sums)
{
    switch (mr) { ROWS3(SUMS8, 0) }
}

/* The same for codes of eight bits, columns j .. j + 16 */
ZQ_INLINE void
tile_u8(const zq_tile *t, int j)
{
    const int64_t bytes = ZQ_NR * (4 + t->group);
    const uint8_t *panel = t->b, *a = t->a;
    v16 f[MR_GROUP];
    v16i sums[MR_GROUP];
    for (int i = 0; i < t->mr; i++) {
        f[i] = v16_zero();
    }
    for (int64_t k = 0; k < t->k; k += t->group, a += t->group, panel += bytes) {
        const int64_t n = zq_min(t->group, t->k - k);
        for (int i = 0; i < t->mr; i++) {
            sums[i] = v16i_zero();
        }
        for (int i = 0; i < t->mr; i += MR) {
            zq_gemm_s8u8_sums_3x16__avx2((int)zq_min(MR, t->mr - i), t->lda, a + i * t->lda, n, panel + 4 * ZQ_NR + j * 4,
                                         sums + i);
        }
        const v16 scale = v16_load((const float *)panel + j);
        for (int i = 0; i < t->mr; i++) {
            f[i] = v16_fma(v16_from_i(sums[i]), scale, f[i]);
        }
    }
    for (int i = 0; i < t->mr; i++) {
        store_group16(t, i, j, f[i]);
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

#define F32(n, far) \
    case n: tile_f32(n, far, t); break;

static void
zq_gemm_u8s8_3x32__avx2(zq_tile *t)
{
    run_tile(t, zq_gemm_u8s8_3x32_tile__avx2);
}

static void
zq_gemm_s8u8_group_6x16_tile__avx2(const zq_tile *t)
{
    for (int j = 0; j < t->nr; j += 16) {
        tile_u8(t, j);
    }
}

static void
zq_gemm_s8u8_group_6x16__avx2(zq_tile *t)
{
    run_tile(t, zq_gemm_s8u8_group_6x16_tile__avx2);
}

static void
zq_gemm_s8u4_group_6x16_tile__avx2(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS6, G4)
}

static void
zq_gemm_s8u4_group_6x16__avx2(zq_tile *t)
{
    run_tile(t, zq_gemm_s8u4_group_6x16_tile__avx2);
}

static void
zq_gemm_f32_3x32_tile__avx2(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS3, F32)
}

static void
zq_gemm_f32_3x32__avx2(zq_tile *t)
{
    run_tile(t, zq_gemm_f32_3x32_tile__avx2);
}

ZQ_TARGET_END

void
zq_fill_gemm__avx2(zq_kernels *t)
{
    t->gemm_u8s8 = zq_gemm_u8s8_3x32__avx2;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_3x32__avx2;
    t->gemm_s8u8_group = zq_gemm_s8u8_group_6x16__avx2;
    t->gemm_s8u4_group = zq_gemm_s8u4_group_6x16__avx2;
    t->center_groups_b8 = center_groups_b8__avx2;
    t->gemm_f32 = zq_gemm_f32_3x32__avx2;
    t->mr_u8s8 = t->mr_f32 = MR;
    t->mr_group = MR_GROUP;
}
#else
typedef int zq_no_x86;
#endif
