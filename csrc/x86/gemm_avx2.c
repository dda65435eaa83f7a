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
    ZQ_UNROLL(3)
    for (int i = 0; i < mr; i++) {
        ZQ_UNROLL(8)
        for (int v = 0; v < NV; v++) {
            acc[i][v] = load256(c + i * ZQ_NR + 8 * v);
        }
    }
    for (int64_t k = 0; k < n; k += 4, b += ZQ_NR * 4) {
        prefetch_ahead(far, t, b);
        ZQ_UNROLL(3)
        for (int i = 0; i < mr; i++) {
            const __m256i s = broadcast4(p->s[i] + k), u = broadcast4(p->u[i] + k);
            ZQ_UNROLL(8)
            for (int v = 0; v < NV; v++) {
                acc[i][v] = dot4_signs(acc[i][v], s, u, load256(b + 32 * v));
            }
        }
    }
    ZQ_UNROLL(3)
    for (int i = 0; i < mr; i++) {
        ZQ_UNROLL(8)
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
    NEAR_OR_FAR_OR_MEMORY(ROWS3, ROWS3, 3, SUMS)
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

/* Unpacking codes of four bits costs three instructions for 64 of them: 6 in 57 of what six rows need. So a tile of more than
 * FEW rows, up to MR_MANY, unpacks DEPTH input features at most to bytes that stay in L1, and all of its rows read those, six
 * at a time; their float sums lie in L1 as well. */
enum { FEW = 24, MR_MANY = 96, DEPTH = 128 };

/* One group, or n input features of it, for some rows. Their sums are kept in `sums` from one part of a group to its next
 * part; the last one adds them, times their scales, to f. */
typedef struct {
    const uint8_t *a;     /* (rows, n), t->lda apart */
    const int32_t *start; /* (rows), t->ld_start apart */
    const uint8_t *codes; /* (n / 4, ZQ_NR, 4), or of four bits as in a panel */
    const float *scales;  /* (ZQ_NR) */
    int64_t n;
    int first, last; /* of the group's parts */
    __m256i (*sums)[NV];
    __m256 (*f)[NV];
} group_part;

/* Adds a part of a group for `times` times mr <= MR_GROUP rows, from row i on. One call for many rows: with groups of
 * 32 a call for each six took 2 to 3 % of the time. */
typedef void (*group_fn)(int mr, int times, int i, const zq_tile *t, const group_part *g);

/* r without its first `rows` rows. Where the rows are used, not where the calls are made: there gcc adds up the pointers in
 * vector registers, and the next rows' loads wait for all products before them. */
ZQ_INLINE void
skip_rows(int rows, const zq_tile *t, group_part *r)
{
    r->a += rows * t->lda;
    r->start += rows * t->ld_start;
    r->sums += r->first && r->last ? 0 : rows;
    r->f += rows;
}

/* Four deep: 16 columns' codes, unpacked or one nibble of each, times activations, into int16. The rows from the third on are
 * at d: an address has room for a and once or twice lda. */
ZQ_INLINE void
step_u4(const int mr, const int first, const int four_bits, const int high, int64_t lda, const uint8_t *a, const uint8_t *d,
        const uint8_t *b, __m256i acc[MR_GROUP][2])
{
    const __m256i w0 = four_bits ? nibbles(b, high) : load256(b), w1 = four_bits ? nibbles(b + 32, high) : load256(b + 32);
    ZQ_UNROLL(8)
    for (int i = 0; i < mr; i++) {
        const __m256i x = broadcast4(i < 3 ? a + i * lda : d + (i - 3) * lda);
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
 * takes as the ceiling. */
ZQ_INLINE void
chunk_u4(const int mr, const int four_bits, const int far, const zq_tile *t, const uint8_t *a, int64_t steps, const uint8_t *b,
         __m256i acc[MR_GROUP][2])
{
    const int64_t lda = t->lda, second = four_bits ? 0 : 4 * ZQ_NR;
    const uint8_t *d = a + 3 * lda;
    __asm__("" : "+r"(d));
    prefetch_half(far, t, b);
    step_u4(mr, 1, four_bits, 0, lda, a, d, b, acc);
    step_u4(mr, 0, four_bits, 1, lda, a + 4, d + 4, b + second, acc);
    ZQ_UNROLL_BY(1)
    while (--steps > 0) {
        a += ZQ_KSTEP;
        d += ZQ_KSTEP;
        b += 4 * ZQ_NR + second;
        __asm__("" : "+r"(a), "+r"(d), "+r"(b));
        prefetch_half(far, t, b);
        step_u4(mr, 0, four_bits, 0, lda, a, d, b, acc);
        step_u4(mr, 0, four_bits, 1, lda, a + 4, d + 4, b + second, acc);
    }
}

/* acc in int32, added to the sums of the chunks before it. */
ZQ_INLINE __m256i
widen_u4(__m256i before, __m256i acc, __m256i one)
{
    return _mm256_add_epi32(before, _mm256_madd_epi16(acc, one));
}

/* first: they start at g->start */
ZQ_INLINE void
keep_sums(const int mr, const int first, const zq_tile *t, const group_part *g, const int at, __m256i acc[MR_GROUP][2])
{
    __m256i(*sums)[NV] = g->sums;
    const int32_t *start = g->start;
    const int64_t ld = t->ld_start;
    const __m256i one = constant16(ones);
    ZQ_UNROLL(8)
    for (int i = 0; i < mr; i++) {
        const __m256i s = _mm256_set1_epi32(first ? start[i * ld] : 0);
        sums[i][at] = widen_u4(first ? s : sums[i][at], acc[i][0], one);
        sums[i][at + 1] = widen_u4(first ? s : sums[i][at + 1], acc[i][1], one);
    }
    leave_registers(sums);
}

/* f = fma(sum of the group, scale, f); alone: the chunk is the group, and its sums start at g->start. */
ZQ_INLINE void
finish_sums(const int mr, const int alone, const zq_tile *t, const group_part *g, const int at, __m256i acc[MR_GROUP][2])
{
    __m256i(*sums)[NV] = g->sums;
    __m256(*f)[NV] = g->f;
    const int32_t *start = g->start;
    const int64_t ld = t->ld_start;
    const __m256 scale0 = _mm256_load_ps(g->scales + 8 * at), scale1 = _mm256_load_ps(g->scales + 8 * at + 8);
    const __m256i one = constant16(ones);
    ZQ_UNROLL(8)
    for (int i = 0; i < mr; i++) {
        const __m256i s = _mm256_set1_epi32(alone ? start[i * ld] : 0);
        const __m256i sum0 = widen_u4(alone ? s : sums[i][at], acc[i][0], one);
        const __m256i sum1 = widen_u4(alone ? s : sums[i][at + 1], acc[i][1], one);
        const __m256 f0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum0), scale0, f[i][at]);
        f[i][at + 1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum1), scale1, f[i][at + 1]);
        f[i][at] = f0;
    }
    leave_registers(f);
}

/* Vectors at and at + 1 of the panel. Sums lie in memory between two chunks: int16 takes the registers. */
ZQ_INLINE void
add_u4(const int mr, const int four_bits, const int far, const zq_tile *t, const group_part *g, const int at)
{
    const int64_t bytes = four_bits ? 16 * ZQ_NR : 32 * ZQ_NR; /* of a chunk's codes */
    const uint8_t *a = g->a, *b = g->codes + 32 * at;
    __m256i acc[MR_GROUP][2];
    int64_t n = g->n;
    if (n <= 32 && g->first && g->last) {
        chunk_u4(mr, four_bits, far, t, a, n / ZQ_KSTEP, b, acc);
        finish_sums(mr, 1, t, g, at, acc);
        return;
    }
    if (g->first) {
        chunk_u4(mr, four_bits, far, t, a, 4, b, acc);
        keep_sums(mr, 1, t, g, at, acc);
        n -= 32, a += 32, b += bytes;
    }
    for (; n > 32 || (n > 0 && !g->last); n -= 32, a += 32, b += bytes) {
        chunk_u4(mr, four_bits, far, t, a, zq_min(n, 32) / ZQ_KSTEP, b, acc);
        keep_sums(mr, 0, t, g, at, acc);
    }
    if (g->last) {
        chunk_u4(mr, four_bits, far, t, a, n / ZQ_KSTEP, b, acc);
        finish_sums(mr, 0, t, g, at, acc);
    }
}

#define ADD_U4(n, far)                                    \
    case n:                                               \
        for (; times > 0; times--, skip_rows(n, t, &r)) { \
            add_u4(n, 0, 0, t, &r, 0);                    \
            add_u4(n, 0, 0, t, &r, 2);                    \
        }                                                 \
        break;

/* A function of its own, for the compiler's sake: one with all heights inside a loop is too much for its registers. */
static __attribute__((noinline)) void
zq_gemm_s8u4_group_sums_6x16__avx2(int mr, int times, int i, const zq_tile *t, const group_part *g)
{
    group_part r = *g;
    skip_rows(i, t, &r);
    switch (mr) { ROWS6(ADD_U4, 0) }
}

/* Few rows: each code is unpacked where it is used. */
ZQ_INLINE void
tile_u4(const int mr, const int far, const zq_tile *t)
{
    __m256 f[MR_GROUP][NV];
    __m256i sums[MR_GROUP][NV];
    const uint8_t *panel = t->b;
    group_part g = {.a = t->a, .start = t->start, .first = 1, .last = 1, .sums = sums, .f = f};
    for (int i = 0; i < mr; i++) {
        f[i][0] = f[i][1] = f[i][2] = f[i][3] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < t->k; k += t->group, g.start++) {
        g.n = zq_min(t->group, t->k - k);
        g.scales = (const float *)panel;
        g.codes = panel + 4 * ZQ_NR;
        prefetch_group(far, t, panel, 4 * ZQ_NR + g.n * 16);
        add_u4(mr, 1, far, t, &g, 0);
        add_u4(mr, 1, far, t, &g, 2);
        g.a += g.n;
        panel = g.codes + g.n * 16;
    }
    for (int i = 0; i < mr; i++) {
        store_group16(t, i, 0, (v16){f[i][0], f[i][1]});
        store_group16(t, i, 16, (v16){f[i][2], f[i][3]});
    }
}

/* Codes of eight bits, by signs as above; they are made signed again, so that the sums start at 0. */
ZQ_INLINE void
group_u8(const int mr, int64_t lda, const uint8_t *a, int64_t n, const uint8_t *b, v16i *out)
{
    const __m256i top = _mm256_set1_epi8((char)0x80);
    v16i sums[MR];
    ZQ_UNROLL(3)
    for (int i = 0; i < mr; i++) {
        sums[i] = out[i];
    }
    for (; n > 0; n -= 4, a += 4, b += ZQ_NR * 4) {
        const __m256i w0 = _mm256_xor_si256(load256(b), top), w1 = _mm256_xor_si256(load256(b + 32), top);
        ZQ_UNROLL(3)
        for (int i = 0; i < mr; i++) {
            const __m256i s = broadcast4(a + i * lda), u = _mm256_abs_epi8(s);
            sums[i].lo = dot4_signs(sums[i].lo, s, u, w0);
            sums[i].hi = dot4_signs(sums[i].hi, s, u, w1);
        }
    }
    ZQ_UNROLL(3)
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

/* Vectors at and at + 1 of the panel for codes of eight bits; the parts are whole groups. */
ZQ_INLINE void
add_u8(int mr, const zq_tile *t, const group_part *g, int at)
{
    v16i sums[MR_GROUP];
    for (int i = 0; i < mr; i++) {
        sums[i] = v16i_zero();
    }
    for (int i = 0; i < mr; i += MR) {
        zq_gemm_s8u8_sums_3x16__avx2((int)zq_min(MR, mr - i), t->lda, g->a + i * t->lda, g->n, g->codes + 32 * at, sums + i);
    }
    const v16 scale = v16_load(g->scales + 8 * at);
    for (int i = 0; i < mr; i++) {
        __m256 *f = g->f[i] + at;
        f[0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i].lo), scale.lo, f[0]);
        f[1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i].hi), scale.hi, f[1]);
    }
}

static void
add_group_u8(int mr, int times, int i, const zq_tile *t, const group_part *g)
{
    group_part r = *g;
    skip_rows(i, t, &r);
    for (; times > 0; times--, skip_rows(mr, t, &r)) {
        add_u8(mr, t, &r, 0);
        if (t->nr > 16) {
            add_u8(mr, t, &r, 2);
        }
    }
}

/* ---- tiles of many rows with groups ------------------------------------------------------------------- */
/* The rows of a tile in `parts` parts of `rows`, `unit` more in the first `longer` ones; never half a pair. */
typedef struct {
    int parts, rows, longer, unit;
} row_parts;

ZQ_INLINE row_parts
parts_of(const zq_tile *t)
{
    const int unit = t->pairs ? 2 : 1, units = t->mr / unit, parts = (t->mr + MR_GROUP - 1) / MR_GROUP;
    return (row_parts){parts, units / parts * unit, units % parts, unit};
}

ZQ_INLINE int
rows_of(const row_parts *r, int part)
{
    return r->rows + (part < r->longer ? r->unit : 0);
}

/* The rows behind t's, as many as it has. */
ZQ_INLINE void
next_rows(zq_tile *t)
{
    t->next_rows = t->mr;
    t->next_a = t->mr * t->lda;
    t->next_cols = t->next_b = t->next_ahead = 0;
    zq_tile_next(t);
}

/* A tile with groups as several, of up to MR_GROUP rows. What the first one prefetches is there for the others. */
ZQ_INLINE void
run_parts(zq_tile *t, const tile_fn tile)
{
    if (t->mr <= MR_GROUP) {
        run_tile(t, tile);
        return;
    }
    const row_parts r = parts_of(t);
    zq_tile part = *t;
    for (int p = 0; p < r.parts; p++, part.ahead = NULL) {
        part.mr = rows_of(&r, p);
        run_tile(&part, tile);
        next_rows(&part);
    }
}

typedef struct {
    __m256 f[MR_MANY][NV];
    __m256i sums[MR_MANY][NV];
    _Alignas(64) uint8_t codes[DEPTH * ZQ_NR];
    zq_tile out; /* the rows that are next, as a tile */
} group_block;

/* n / 8 * 32 * 4 bytes of a panel, two codes each */
ZQ_INLINE void
unpack_codes(const uint8_t *b, int64_t n, uint8_t *codes)
{
    for (int64_t k = 0; k < n; k += ZQ_KSTEP, b += 4 * ZQ_NR, codes += 8 * ZQ_NR) {
        ZQ_UNROLL(4)
        for (int v = 0; v < NV; v++) {
            _mm256_store_si256((__m256i *)(codes + 32 * v), nibbles(b + 32 * v, 0));
            _mm256_store_si256((__m256i *)(codes + 4 * ZQ_NR + 32 * v), nibbles(b + 32 * v, 1));
        }
    }
}

/* For run_tile: t->a are the float sums of t's rows. */
static void
store_groups(const zq_tile *t)
{
    const __m256(*f)[NV] = t->a;
    for (int i = 0; i < t->mr; i++) {
        store_group16(t, i, 0, (v16){f[i][0], f[i][1]});
        store_group16(t, i, 16, (v16){f[i][2], f[i][3]});
    }
}

/* g for all rows of the tile; at_end: y as well. Each part's y follows its sums: stores of a whole tile at once would have to
 * wait for memory. */
ZQ_INLINE void
add_part(const zq_tile *t, const row_parts *r, group_block *s, const group_part *g, const int at_end, const group_fn add)
{
    if (!at_end) {
        const int more = r->rows + r->unit;
        add(more, r->longer, 0, t, g);
        add(r->rows, r->parts - r->longer, r->longer * more, t, g);
        return;
    }
    for (int p = 0, i = 0; p < r->parts; p++, i += s->out.mr) {
        s->out.mr = rows_of(r, p);
        prefetch_residual(&s->out);
        add(s->out.mr, 1, i, t, g);
        s->out.a = s->f + i;
        run_tile(&s->out, store_groups);
        next_rows(&s->out);
    }
}

/* A tile with codes of `bits` bits; those of four are unpacked. */
ZQ_INLINE void
run_groups(const int bits, const zq_tile *t, const group_fn add)
{
    group_block s;
    const row_parts r = parts_of(t);
    const uint8_t *panel = t->b;
    group_part g = {.a = t->a, .start = t->start, .sums = s.sums, .f = s.f};
    s.out = *t;
    for (int i = 0; i < t->mr; i++) {
        s.f[i][0] = s.f[i][1] = s.f[i][2] = s.f[i][3] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < t->k; k += t->group, g.start++) {
        const int64_t n = zq_min(t->group, t->k - k), depth = bits == 4 ? DEPTH : n;
        const uint8_t *b = panel + 4 * ZQ_NR;
        prefetch_group(t->ahead != NULL, t, panel, 4 * ZQ_NR + n * ZQ_NR * bits / 8);
        g.scales = (const float *)panel;
        for (int64_t at = 0; at < n; at += g.n, g.a += g.n, b += g.n * ZQ_NR * bits / 8) {
            g.n = zq_min(depth, n - at);
            g.first = at == 0;
            g.last = at + g.n == n;
            g.codes = bits == 4 ? s.codes : b;
            if (bits == 4) {
                unpack_codes(b, g.n, s.codes);
            }
            add_part(t, &r, &s, &g, g.last && k + n == t->k, add);
        }
        panel = b;
    }
}

/* ---- float32 ---------------------------------------------------------------------------------------- */

ZQ_INLINE void
tile_f32(const int mr, const int far, const zq_tile *t)
{
    v16 acc[MR][2];
    const float *a = t->a, *b = t->b;
    ZQ_UNROLL(3)
    for (int i = 0; i < mr; i++) {
        acc[i][0] = t->sums_in ? v16_load(t->sums_in + i * ZQ_NR) : v16_zero();
        acc[i][1] = t->sums_in ? v16_load(t->sums_in + i * ZQ_NR + 16) : v16_zero();
    }
    for (int64_t k = 0; k < t->k; k++, b += ZQ_NR) {
        const v16 w0 = v16_load(b), w1 = v16_load(b + 16);
        prefetch_ahead(far, t, b);
        ZQ_UNROLL(3)
        for (int i = 0; i < mr; i++) {
            const v16 x = v16_set1(a[i * t->lda + k]);
            acc[i][0] = v16_fma(x, w0, acc[i][0]);
            acc[i][1] = v16_fma(x, w1, acc[i][1]);
        }
    }
    if (t->sums_out) {
        ZQ_UNROLL(3)
        for (int i = 0; i < mr; i++) {
            v16_store(t->sums_out + i * ZQ_NR, acc[i][0]);
            v16_store(t->sums_out + i * ZQ_NR + 16, acc[i][1]);
        }
        return;
    }
    const v16 bias0 = v16_load(t->bias), bias1 = v16_load(t->bias + 16);
    ZQ_UNROLL(3)
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
zq_gemm_s8u8_group_6x16__avx2(zq_tile *t)
{
    EACH_TILE(t, run_groups(8, t, add_group_u8))
}

static void
zq_gemm_s8u4_group_6x16_tile__avx2(const zq_tile *t)
{
    NEAR_OR_FAR_OR_MEMORY(ROWS6, ROWS3, 3, G4)
}

ZQ_INLINE void
run_group_u4(zq_tile *t)
{
    if (t->mr > FEW) {
        run_groups(4, t, zq_gemm_s8u4_group_sums_6x16__avx2);
    }
    else {
        run_parts(t, zq_gemm_s8u4_group_6x16_tile__avx2);
    }
}

static void
zq_gemm_s8u4_group_6x16__avx2(zq_tile *t)
{
    EACH_TILE(t, run_group_u4(t))
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
    t->mr_group = MR_MANY;
}
#else
typedef int zq_no_x86;
#endif
