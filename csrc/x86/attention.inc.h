/* Attention's kernels on v16: what ref/attention.c does, sixteen lanes at a time. Included by nn_avx2.c and nn_avx512.c
 * behind nn.inc.h, with MATMUL_MR and MATMUL_NV set to the register tile of the level for float32, CODE_ROWS (a divisor of 8)
 * and CODE_NV to that for codes, and v16i_dot4(acc, a, b) to acc + the sum of the four products u8 x s8 in each lane. */
#include "../ref/attention.h"

/* 2^t of `ways` vectors in step, as v16_exps. */
ZQ_INLINE void
v16_exp2s(v16 *t, const int ways)
{
#define EACH ZQ_UNROLL(4) for (int u = 0; u < ways; u++)
    v16 k[4], r[4], p[4];
    EACH { t[u] = v16_max(v16_set1(ZQ_EXP2_LO), t[u]); }
    EACH { k[u] = v16_add(t[u], v16_set1(ZQ_EXP2_MAGIC)); }
    EACH { r[u] = v16_sub(k[u], v16_set1(ZQ_EXP2_MAGIC)); }
    EACH { r[u] = v16_sub(t[u], r[u]); }
    EACH { p[u] = v16_set1(zq_exp2_poly[5]); }
    ZQ_UNROLL(8)
    for (int i = 4; i >= 0; i--) {
        EACH { p[u] = v16_fma(p[u], r[u], v16_set1(zq_exp2_poly[i])); }
    }
    EACH { t[u] = v16_mul(p[u], v16_exp_power(k[u])); }
#undef EACH
}

ZQ_INLINE v16
v16_exp2(v16 t)
{
    v16_exp2s(&t, 1);
    return t;
}

/* ---- moving rows ---- */

/* 8 x 8 floats: pairs, then quads, then the 128-bit halves. */
ZQ_INLINE void
transposed_8x8(const float *x, int64_t ldx, __m256 *y)
{
    __m256 r[8], p[8];
    ZQ_UNROLL(8)
    for (int i = 0; i < 8; i++) {
        r[i] = _mm256_loadu_ps(x + i * ldx);
    }
    ZQ_UNROLL(8)
    for (int i = 0; i < 8; i += 2) {
        p[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        p[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    ZQ_UNROLL(8)
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(p[i], p[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(p[i], p[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(p[i + 1], p[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(p[i + 1], p[i + 3], 0xee);
    }
    ZQ_UNROLL(8)
    for (int i = 0; i < 4; i++) {
        y[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        y[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
}

ZQ_INLINE void
transpose_8x8(const float *x, int64_t ldx, float *y, int64_t ldy)
{
    __m256 columns[8];
    transposed_8x8(x, ldx, columns);
    ZQ_UNROLL(8)
    for (int i = 0; i < 8; i++) {
        _mm256_storeu_ps(y + i * ldy, columns[i]);
    }
}

static void
transpose_f32(const float *x, int64_t rows, int64_t cols, int64_t ldx, float *y, int64_t ldy)
{
    const int64_t rows8 = rows & ~(int64_t)7, cols8 = cols & ~(int64_t)7;
    for (int64_t r = 0; r < rows8; r += 8) {
        for (int64_t c = 0; c < cols8; c += 8) {
            transpose_8x8(x + r * ldx + c, ldx, y + c * ldy + r, ldy);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = r < rows8 ? cols8 : 0; c < cols; c++) {
            y[c * ldy + r] = x[r * ldx + c];
        }
    }
}

static void
copy_rows_f32(const float *x, int64_t rows, int64_t n, int64_t ldx, float *y, int64_t ldy)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < n; j += 16) {
            v16_store(y + r * ldy + j, load16(x + r * ldx + j, n - j));
        }
    }
}

static void
divide_rows_f32(const float *x, int64_t rows, int64_t n, int64_t ldx, const float *l, float *y, int64_t ldy)
{
    for (int64_t r = 0; r < rows; r++) {
        const v16 f = v16_set1(1.0f / l[r]);
        for (int64_t j = 0; j < n; j += 16) {
            store16(y + r * ldy + j, v16_add(v16_mul(load16(x + r * ldx + j, n - j), f), v16_zero()), n - j);
        }
    }
}

/* ---- softmax ---- */

/* The maximum of row i in this tile and those before. */
ZQ_INLINE float
running_max(const zq_softmax_tile *t, int64_t i)
{
    return zq_maxf(t->max[i], v16_hmax(max_lanes(t->s + i * t->lds, t->keys)));
}

/* m, l and o of all rows brought to the maxima of this tile too, and its sums added. Where any of them rises all rows are
 * scaled, most by 1: cheaper than a branch for each. */
ZQ_INLINE void
raise_max(const zq_softmax_tile *t, const float *max, const float *sum)
{
    const v16 none = v16_set1(-INFINITY), one = v16_set1(1.0f), m = v16_loadn(max, t->rows);
    const v16 old = keep(v16_loadn(t->max, t->rows), t->rows, none);
    v16_storen(t->max, m, t->rows);
    if (v16_hmax(old) == -INFINITY) { /* the first tile */
        v16_storen(t->sum, v16_loadn(sum, t->rows), t->rows);
        return;
    }
    v16 l = v16_loadn(t->sum, t->rows), c = v16_exp2(v16_mul(v16_sub(old, m), v16_loadn(t->factor, t->rows)));
    c = v16_select_lt(none, old, v16_select_lt(old, m, c, one), one);
    if (v16_hmin(c) < 1.0f) {
        float factor[16];
        v16_store(factor, c);
        l = v16_mul(l, c);
        for (int64_t i = 0; i < t->rows; i++) {
            scale_f32(t->o + i * t->ldo, t->n, factor[i], t->o + i * t->ldo);
        }
    }
    v16_storen(t->sum, v16_add(l, v16_loadn(sum, t->rows)), t->rows);
}

/* p of one row; returns its sums in the lanes. */
ZQ_INLINE v16
exp2_row(float *s, int64_t keys, v16 max, v16 f)
{
    v16 sum[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    int64_t j = 0;
    for (; j + 64 <= keys; j += 64) {
        ZQ_UNROLL(4)
        for (int u = 0; u < 4; u += EXP_WAYS) {
            v16 p[EXP_WAYS];
            ZQ_UNROLL(4)
            for (int w = 0; w < EXP_WAYS; w++) {
                p[w] = v16_mul(v16_sub(v16_load(s + j + 16 * (u + w)), max), f);
            }
            v16_exp2s(p, EXP_WAYS);
            ZQ_UNROLL(4)
            for (int w = 0; w < EXP_WAYS; w++) {
                v16_store(s + j + 16 * (u + w), p[w]);
                sum[u + w] = v16_add(sum[u + w], p[w]);
            }
        }
    }
    ZQ_UNROLL(4)
    for (int u = 0; u < 4; u++) {
        const int64_t at = j + 16 * u, n = zq_min(keys - at, 16);
        if (n > 0) {
            const v16 p = keep(v16_exp2(v16_mul(v16_sub(v16_loadn(s + at, n), max), f)), n, v16_zero());
            v16_storen(s + at, p, n);
            sum[u] = v16_add(sum[u], p);
        }
    }
    return v16_add(v16_add(sum[0], sum[1]), v16_add(sum[2], sum[3]));
}

/* Each row's maximum is taken a row ahead, so that its horizontal steps end under exp2. */
static void
softmax_tile_f32(const zq_softmax_tile *t)
{
    float max[16], sum[16], next = running_max(t, 0);
    assert(t->rows >= 1 && t->rows <= MATMUL_MR);
    for (int64_t i = 0; i < t->rows; i++) {
        max[i] = next;
        next = i + 1 < t->rows ? running_max(t, i + 1) : 0.0f;
        sum[i] = v16_hsum(exp2_row(t->s + i * t->lds, t->keys, v16_set1(max[i]), v16_set1(t->factor[i])));
    }
    raise_max(t, max, sum);
}

/* ---- int8 ---- */

/* The same four codes in every lane. */
ZQ_INLINE v16i
v16i_four(const uint8_t *codes)
{
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return v16i_set1(four);
}

/* Bits of ZQ_CODE_ROUND plus the code, zq_exp2_code, of `ways` vectors in step, as v16_exps. */
ZQ_INLINE void
v16_exp2_codes(v16 *t, v16i *code, const int ways)
{
#define EACH ZQ_UNROLL(4) for (int u = 0; u < ways; u++)
    v16 k[4], p[4];
    EACH { t[u] = v16_max(v16_set1(ZQ_CODE_LO), t[u]); }
    EACH { k[u] = v16_add(t[u], v16_set1(ZQ_CODE_MAGIC)); }
    EACH { p[u] = v16_sub(k[u], v16_set1(ZQ_CODE_MAGIC)); }
    EACH { t[u] = v16_sub(t[u], p[u]); }
    EACH { p[u] = v16_set1(zq_code_poly[3]); }
    ZQ_UNROLL(4)
    for (int i = 2; i >= 0; i--) {
        EACH { p[u] = v16_fma(p[u], t[u], v16_set1(zq_code_poly[i])); }
    }
    EACH { k[u] = v16_from_bits(v16i_shl(v16_bits(k[u]), 23)); }
    EACH { code[u] = v16_bits(v16_fma(p[u], k[u], v16_set1(ZQ_CODE_ROUND))); }
#undef EACH
}

ZQ_INLINE v16i
v16_abs_bits(v16 x)
{
    return v16i_and(v16_bits(x), v16i_set1(0x7fffffff));
}

/* zq_code_scale of sixteen. */
ZQ_INLINE v16
code_scales(v16 absmax, float *scale)
{
    const v16 least = v16_set1(127.0f * FLT_MIN), whole = v16_set1(127.0f);
    v16_store(scale, v16_select_lt(absmax, least, v16_set1(1.0f), v16_div(absmax, whole)));
    return v16_select_lt(absmax, least, v16_zero(), v16_div(whole, absmax));
}

/* Codes of one row. The bias is even, so that x + (ZQ_CODE_ROUND + bias) rounds as x + ZQ_CODE_ROUND does. */
ZQ_INLINE void
quantize_head(const float *x, int64_t n, v16 inv, v16 round, uint8_t *q)
{
    int64_t j = 0;
    ZQ_UNROLL_BY(4)
    for (; j + 16 <= n; j += 16) {
        v16i_store_b8(q + j, v16_bits(v16_add(v16_mul(v16_load(x + j), inv), round)));
    }
    if (j < n) {
        const v16i code = v16_bits(v16_add(v16_mul(v16_loadn(x + j, n - j), inv), round));
        v16i_storen_b8(q + j, code, zq_round_up(n - j, 4));
    }
}

/* Of the first sixteen of `rows` rows: their scales, and what their elements are to be multiplied by. */
ZQ_INLINE void
head_scales(const float *x, int64_t rows, int64_t n, int64_t ldx, float *inv, float *scale)
{
    v16i top[16];
    float found[16];
    for (int64_t i = 0; i < 16; i++) { /* of fewer rows the last is repeated */
        top[i] = v16i_zero();
        ZQ_UNROLL_BY(4)
        for (int64_t j = 0; j < n; j += 16) {
            top[i] = v16i_max(top[i], v16_abs_bits(load16(x + j, n - j)));
        }
        x += i + 1 < rows ? ldx : 0;
    }
    v16_store(inv, code_scales(v16_from_bits(v16i_hmax16(top)), found));
    v16_storen(scale, v16_load(found), zq_min(16, rows));
}

/* The scales of sixteen rows are found before the codes of the sixteen in front of them are made: a long chain of latencies
 * beside independent work. */
ZQ_INLINE void
quantize_heads(const float *x, int64_t rows, const int64_t n, int64_t ldx, int bias, uint8_t *q, int64_t ldq, float *scale)
{
    const v16 round = v16_set1(ZQ_CODE_ROUND + (float)bias);
    float inv[2][16];
    head_scales(x, rows, n, ldx, inv[0], scale);
    for (int64_t i = 0; i < rows; i += 16) {
        if (i + 16 < rows) {
            head_scales(x + (i + 16) * ldx, rows - i - 16, n, ldx, inv[(i / 16 + 1) % 2], scale + i + 16);
        }
        for (int64_t r = i; r < zq_min(i + 16, rows); r++) {
            quantize_head(x + r * ldx, n, v16_set1(inv[i / 16 % 2][r - i]), round, q + r * ldq);
        }
    }
}

/* The usual widths are constants: loops of one to four vectors cost less than their branches. */
static void
quantize_heads_f32_b8(const float *x, int64_t rows, int64_t n, int64_t ldx, int bias, uint8_t *q, int64_t ldq, float *scale)
{
    switch (rows > 0 ? n : -1) {
    case -1: break;
    case 32: quantize_heads(x, rows, 32, ldx, bias, q, ldq, scale); break;
    case 64: quantize_heads(x, rows, 64, ldx, bias, q, ldq, scale); break;
    default: quantize_heads(x, rows, n, ldx, bias, q, ldq, scale);
    }
}

/* A word of four codes is moved as a float is. */
static void
pack_rows_s8(const uint8_t *q, int64_t rows, int64_t n, uint8_t *panels, int32_t *colsum)
{
    for (int64_t i = 0; i < rows; i += ZQ_NR) {
        const int64_t here = zq_min(ZQ_NR, rows - i);
        uint8_t *panel = panels + i * n;
        transpose_f32((const float *)(const void *)(q + i * n), here, n / 4, n / 4, (float *)(void *)panel, ZQ_NR);
        for (int64_t j = 0; j < here; j += 16) {
            v16i sum = v16i_zero();
            for (int64_t k = 0; k < n; k += 4) {
                const v16i words = v16i_load((const int32_t *)(const void *)(panel + k * ZQ_NR) + j);
                sum = v16i_dot4(sum, v16i_set1((int32_t)0x80808080), words);
            }
            v16i_store(colsum + i + j, v16i_sub(v16i_zero(), sum));
        }
    }
}

/* Four rows of codes make a word each; m of its sixteen columns are there. */
ZQ_INLINE v16i
pack_word(const float *x, int64_t rows, int64_t ldx, v16 inv, int64_t m)
{
    v16i word = v16i_zero();
    ZQ_UNROLL(4)
    for (int u = 3; u >= 0; u--) {
        const v16 row = u < rows ? load16(x + u * ldx, m) : v16_zero();
        word = v16i_push_byte(word, v16_bits(v16_add(v16_mul(row, inv), v16_set1(ZQ_CODE_ROUND))));
    }
    return word;
}

/* Vectors of columns, side by side: the cache lines of a row lie beside each other, and rows may be so far apart that few of
 * them stay in L1. Of each vector m columns are there; panels are `panel` bytes apart. */
ZQ_INLINE void
pack_vectors(const float *x, int64_t rows, int64_t m, int64_t ldx, uint8_t *q, int64_t panel, float *scale, const int vectors)
{
    v16i top[4];
    v16 inv[4];
#define EACH ZQ_UNROLL(4) for (int u = 0; u < vectors; u++)
    EACH { top[u] = v16i_zero(); }
    for (int64_t k = 0; k < rows; k++) {
        EACH { top[u] = v16i_max(top[u], v16_abs_bits(load16(x + k * ldx + 16 * u, m))); }
    }
    EACH { inv[u] = code_scales(v16_from_bits(top[u]), scale + 16 * u); }
#define PACK_WORDS(here) \
    EACH { v16i_store((int32_t *)(void *)(q + u / 2 * panel + u % 2 * 64), pack_word(x + 16 * u, here, ldx, inv[u], m)); }
    for (; rows >= 4; rows -= 4, x += 4 * ldx, q += 4 * ZQ_NR) {
        PACK_WORDS(4)
    }
    if (rows > 0) {
        PACK_WORDS(rows)
    }
#undef PACK_WORDS
#undef EACH
}

static void
pack_columns_f32_s8(const float *x, int64_t rows, int64_t n, int64_t ldx, uint8_t *q, float *scale)
{
    const int64_t panel = ZQ_NR * zq_round_up(rows, 4);
    int64_t j = 0;
    for (; j + 64 <= n; j += 64, q += 2 * panel) {
        pack_vectors(x + j, rows, 16, ldx, q, panel, scale + j, 4);
    }
    if (j + 32 <= n) {
        pack_vectors(x + j, rows, 16, ldx, q, panel, scale + j, 2);
        j += 32;
        q += panel;
    }
    for (int64_t at = 0; j < zq_round_up(n, ZQ_NR); j += 16, at += 64) {
        pack_vectors(x + zq_min(j, n), rows, zq_max(0, zq_min(16, n - j)), ldx, q + at, panel, scale + j, 1);
    }
}

/* Scores of `keys` keys from `key` on, (keys, 16 nv); keys and nv are constants in every call. max becomes the larger of it
 * and them. */
ZQ_INLINE void
code_scores(const zq_code_tile *t, int64_t key, int64_t lane, v16 *max, const int keys, const int nv)
{
    const int64_t d4 = t->d4;
    const uint8_t *k = t->k + key * d4, *q = t->q + 4 * lane;
    float *s = t->s + key * 16 * nv;
    v16i acc[CODE_ROWS][CODE_NV];
    ZQ_UNROLL(16)
    for (int i = 0; i < keys; i++) {
        ZQ_UNROLL(4)
        for (int j = 0; j < nv; j++) {
            acc[i][j] = v16i_load(t->start + lane + 16 * j);
        }
    }
    for (int64_t c = 0; c < d4; c += 4, q += 4 * ZQ_NR) {
        v16i qc[CODE_NV];
        ZQ_UNROLL(4)
        for (int j = 0; j < nv; j++) {
            qc[j] = v16i_load((const int32_t *)(const void *)(q + 64 * j));
        }
        ZQ_UNROLL(16)
        for (int i = 0; i < keys; i++) {
            const v16i kc = v16i_four(k + i * d4 + c);
            ZQ_UNROLL(4)
            for (int j = 0; j < nv; j++) {
                acc[i][j] = v16i_dot4(acc[i][j], kc, qc[j]);
            }
        }
    }
    ZQ_UNROLL(16)
    for (int i = 0; i < keys; i++) {
        const v16 scale = v16_set1(t->k_scale[key + i]);
        ZQ_UNROLL(4)
        for (int j = 0; j < nv; j++) {
            const v16 x = v16_mul(v16_from_i(acc[i][j]), scale);
            v16_store(s + 16 * (i * nv + j), x);
            max[j] = v16_max(max[j], x);
        }
    }
}

/* Codes of p of four keys, of which `keys` are there, a word in each lane; s has a row per key, lds apart. */
ZQ_INLINE v16i
code_word(const float *s, const int64_t lds, int64_t keys, v16 max, v16 f)
{
    v16i code[4], word = v16i_zero();
    ZQ_UNROLL(4)
    for (int from = 0; from < 4; from += EXP_WAYS) {
        v16 t[EXP_WAYS];
        ZQ_UNROLL(4)
        for (int u = 0; u < EXP_WAYS; u++) { /* of fewer keys the last is repeated */
            t[u] = v16_mul(v16_sub(v16_load(s + zq_min(from + u, keys - 1) * lds), max), f);
        }
        v16_exp2_codes(t, code + from, EXP_WAYS);
    }
    ZQ_UNROLL(4)
    for (int u = 3; u >= 0; u--) {
        word = v16i_push_byte(word, u < keys ? code[u] : v16i_zero());
    }
    return word;
}

/* Scores to codes of p, (keys / 4, 16 nv, 4); their sums in the lanes. */
ZQ_INLINE void
code_softmax(const zq_code_tile *t, int64_t lane, const v16 *max, v16i *sum, const int nv)
{
    const v16i ones = v16i_set1(0x01010101);
    const float *s = t->s;
    uint8_t *p = t->p;
    v16 f[CODE_NV];
    ZQ_UNROLL(4)
    for (int j = 0; j < nv; j++) {
        f[j] = v16_load(t->factor + lane + 16 * j);
        sum[j] = v16i_zero();
    }
#define CODE_WORDS(here) \
    ZQ_UNROLL(4) for (int j = 0; j < nv; j++) \
    { \
        const v16i word = code_word(s + 16 * j, 16 * nv, here, max[j], f[j]); \
        v16i_store((int32_t *)(void *)(p + 64 * j), word); \
        sum[j] = v16i_dot4(sum[j], word, ones); \
    }
    int64_t keys = t->keys;
    for (; keys >= 4; keys -= 4, s += 64 * nv, p += 64 * nv) {
        CODE_WORDS(4)
    }
    if (keys > 0) {
        CODE_WORDS(keys)
    }
#undef CODE_WORDS
}

/* o of the query rows in CODE_ROWS lanes += P V, 16 nv columns from `col` on. */
ZQ_INLINE void
code_values(const zq_code_tile *t, int64_t lane, int64_t ld_p, int64_t row, int64_t col, int first)
{
    const int64_t keys4 = zq_round_up(t->keys, 4);
    const uint8_t *v = t->v + col / ZQ_NR * ZQ_NR * keys4 + col % ZQ_NR * 4, *p = t->p + 4 * lane;
    v16i acc[CODE_ROWS][CODE_NV];
    ZQ_UNROLL(16)
    for (int i = 0; i < CODE_ROWS; i++) {
        ZQ_UNROLL(4)
        for (int j = 0; j < CODE_NV; j++) {
            acc[i][j] = v16i_zero();
        }
    }
    for (int64_t k = 0; k < keys4; k += 4, p += 4 * ld_p, v += 4 * ZQ_NR) {
        v16i vk[CODE_NV];
        ZQ_UNROLL(4)
        for (int j = 0; j < CODE_NV; j++) {
            vk[j] = v16i_load((const int32_t *)(const void *)(v + 64 * j));
        }
        ZQ_UNROLL(16)
        for (int i = 0; i < CODE_ROWS; i++) {
            const v16i pk = v16i_four(p + 4 * i);
            ZQ_UNROLL(4)
            for (int j = 0; j < CODE_NV; j++) {
                acc[i][j] = v16i_dot4(acc[i][j], pk, vk[j]);
            }
        }
    }
    ZQ_UNROLL(16)
    for (int i = 0; i < CODE_ROWS; i++) {
        float *o = t->o + (row + i) * t->n + col;
        ZQ_UNROLL(4)
        for (int j = 0; j < CODE_NV; j++) {
            const v16 before = first ? v16_zero() : v16_load(o + 16 * j);
            v16_store(o + 16 * j, v16_fma(v16_from_i(acc[i][j]), v16_load(t->v_scale + col + 16 * j), before));
        }
    }
}

/* m, l and o of sixteen query rows brought to the maximum of this tile too, and its sum added. Where any rises, all are
 * scaled, most by 1. */
ZQ_INLINE void
raise_lanes(const zq_code_tile *t, int64_t lane, int first, v16 max, v16i sum)
{
    const v16 old = v16_load(t->max + lane), one = v16_set1(1.0f);
    v16 l = v16_load(t->sum + lane);
    if (!first) {
        const v16 c = v16_select_lt(old, max, v16_exp2(v16_mul(v16_sub(old, max), v16_load(t->factor + lane))), one);
        if (v16_hmin(c) < 1.0f) {
            float factor[16];
            v16_store(factor, c);
            l = v16_mul(l, c);
            for (int64_t i = 0; i < 16 && lane + i < t->rows; i++) {
                float *o = t->o + (lane + i) * t->n;
                scale_f32(o, t->n, factor[i], o);
            }
        }
    }
    v16_store(t->max + lane, max);
    v16_store(t->sum + lane, v16_add(l, v16_from_i(sum)));
}

/* 16 nv query rows. A last block of keys starts so early that it is whole: some scores are computed twice. */
ZQ_INLINE void
attend_lanes(const zq_code_tile *t, int64_t lane, const int nv)
{
    const int first = t->max[lane] == -INFINITY;
    v16 max[CODE_NV];
    v16i sum[CODE_NV];
    ZQ_UNROLL(4)
    for (int j = 0; j < nv; j++) {
        max[j] = v16_load(t->max + lane + 16 * j);
    }
    for (int64_t key = 0; key < t->keys && t->keys >= CODE_ROWS; key += CODE_ROWS) {
        code_scores(t, zq_min(key, t->keys - CODE_ROWS), lane, max, CODE_ROWS, nv);
    }
    for (int64_t key = 0; key < t->keys && t->keys < CODE_ROWS; key++) {
        code_scores(t, key, lane, max, 1, nv);
    }
    code_softmax(t, lane, max, sum, nv);
    ZQ_UNROLL(4)
    for (int j = 0; j < nv; j++) {
        raise_lanes(t, lane + 16 * j, first, max[j], sum[j]);
    }
    for (int64_t i = 0; i < 16 * nv && lane + i < t->rows; i += CODE_ROWS) {
        for (int64_t col = 0; col < t->n; col += 16 * CODE_NV) {
            code_values(t, i, 16 * nv, lane + i, col, first);
        }
    }
}

static void
attend_tile_b8(const zq_code_tile *t)
{
    assert(t->keys >= 1 && t->rows >= 1 && t->rows <= ZQ_NR && t->n % ZQ_NR == 0 && t->d4 % 4 == 0);
    int64_t lane = 0;
    for (; lane + 16 * (CODE_NV - 1) < t->rows; lane += 16 * CODE_NV) {
        attend_lanes(t, lane, CODE_NV);
    }
    for (; lane < t->rows; lane += 16) {
        attend_lanes(t, lane, 1);
    }
}

/* ---- float32 ---- */

/* mr x 16 nv accumulators stay in registers; mr and nv are constants in every call. */
ZQ_INLINE void
matmul_tile(const zq_tile *t, int64_t col, int64_t ldb, int accumulate, const int mr, const int nv)
{
    const float *a = t->a, *b = (const float *)t->b + col;
    const int64_t lda = t->lda, ldc = t->ldy, depth = t->k;
    float *c = t->y + col;
    v16 acc[MATMUL_MR][MATMUL_NV];
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        ZQ_UNROLL(4)
        for (int j = 0; j < nv; j++) {
            acc[i][j] = accumulate ? v16_load(c + i * ldc + 16 * j) : v16_zero();
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        v16 bk[MATMUL_NV];
        ZQ_UNROLL(4)
        for (int j = 0; j < nv; j++) {
            bk[j] = v16_load(b + k * ldb + 16 * j);
            if (mr <= 8) { /* so few rows wait for memory: a decoding step reads every page of keys once, 4 KiB ahead */
                _mm_prefetch((const char *)(b + k * ldb + 16 * j + 1024), _MM_HINT_T0);
            }
        }
        ZQ_UNROLL(16)
        for (int i = 0; i < mr; i++) {
            const v16 aik = v16_set1(a[i * lda + k]);
            ZQ_UNROLL(4)
            for (int j = 0; j < nv; j++) {
                acc[i][j] = v16_fma(aik, bk[j], acc[i][j]);
            }
        }
    }
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        ZQ_UNROLL(4)
        for (int j = 0; j < nv; j++) {
            v16_store(c + i * ldc + 16 * j, acc[i][j]);
        }
    }
}

/* The constant heights. Cases above the level's tile are never reached and compile to nothing. */
ZQ_INLINE void
matmul_columns(const zq_tile *t, int64_t col, int64_t ldb, int accumulate, const int nv)
{
    switch (t->mr) {
#define HEIGHT(h) \
    case h: \
        if (h <= MATMUL_MR) { \
            matmul_tile(t, col, ldb, accumulate, h <= MATMUL_MR ? h : 1, nv); \
        } \
        break;
        HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6)
        HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12)
#undef HEIGHT
    default: break;
    }
}

static void
matmul_f32(const zq_tile *t, int64_t ldb, int64_t panel, int accumulate)
{
    assert(t->nr % 16 == 0 && t->mr <= MATMUL_MR);
    zq_tile part = *t;
    for (int64_t col = 0; col < t->nr; col += ZQ_NR) {
        part.b = (const float *)t->b + col / ZQ_NR * panel;
        part.y = t->y + col;
        const int64_t nr = zq_min(ZQ_NR, t->nr - col);
        int64_t at = 0;
        for (; at + 16 * MATMUL_NV <= nr; at += 16 * MATMUL_NV) {
            matmul_columns(&part, at, ldb, accumulate, MATMUL_NV);
        }
        for (; at < nr; at += 16) {
            matmul_columns(&part, at, ldb, accumulate, 1);
        }
    }
}

/* ---- few keys ---- */

/* Sixteen query rows side by side in the lanes, so that the softmax over keys has no horizontal steps. */
typedef struct {
    float q[ZQ_FEW_DIM * 16];  /* (head_dim, 16): Q^T */
    float s[ZQ_FEW_KEYS * 16]; /* (keys, 16): scores, then p */
    float inv[16];             /* 1 / l */
    float rows[16 * ZQ_FEW_DIM], keys[FEW_BLOCK * ZQ_FEW_DIM]; /* rows repeated to a whole block */
} few_keys;

/* A block of `block` rows of x (rows, n), from row *from on; *ld is their distance. One that would go beyond the end starts
 * earlier (*from says where), so that some rows are computed twice; of fewer rows than a block, the last is repeated. */
ZQ_INLINE const float *
whole_block(const float *x, int64_t rows, int64_t n, int64_t ldx, int64_t *from, int64_t block, float *copy, int64_t *ld)
{
    if (rows >= block) {
        *from = zq_min(*from, rows - block);
        *ld = ldx;
        return x + *from * ldx;
    }
    for (int64_t r = 0; r < block; r++) {
        copy_rows_f32(x + zq_min(r, rows - 1) * ldx, 1, n, ldx, copy + r * n, n);
    }
    *ld = n;
    return copy;
}

/* q (n, 16) = sixteen rows of n transposed, n a multiple of 8; in whole vectors, as they are read right afterwards. */
ZQ_INLINE void
few_queries(const float *x, int64_t n, int64_t ldx, float *q)
{
    for (int64_t i = 0; i < n; i += 8) {
        __m256 lo[8], hi[8];
        transposed_8x8(x + i, ldx, lo);
        transposed_8x8(x + 8 * ldx + i, ldx, hi);
        ZQ_UNROLL(8)
        for (int j = 0; j < 8; j++) {
            v16_store(q + 16 * (i + j), v16_join(lo[j], hi[j]));
        }
    }
}

/* s (FEW_BLOCK keys, 16) = K Q^T; returns the larger of max and these scores. */
ZQ_INLINE v16
few_scores(const float *k, int64_t ld_k, int64_t head_dim, const float *q, float *s, v16 max)
{
    v16 acc[FEW_BLOCK];
    ZQ_UNROLL(16)
    for (int r = 0; r < FEW_BLOCK; r++) {
        acc[r] = v16_zero();
    }
    for (int64_t i = 0; i < head_dim; i++) {
        const v16 qi = v16_load(q + 16 * i);
        ZQ_UNROLL(16)
        for (int r = 0; r < FEW_BLOCK; r++) {
            acc[r] = v16_fma(v16_set1(k[r * ld_k + i]), qi, acc[r]);
        }
    }
    ZQ_UNROLL(16)
    for (int r = 0; r < FEW_BLOCK; r++) {
        v16_store(s + 16 * r, acc[r]);
        max = v16_max(max, acc[r]);
    }
    return max;
}

/* Scores to p; returns l. Sums go over the keys as exp2_row and v16_hsum go over lanes. */
ZQ_INLINE v16
few_softmax(float *s, int64_t keys, v16 max, float factor)
{
    const v16 f = v16_set1(factor);
    v16 sum[16];
    ZQ_UNROLL_BY(4)
    for (int64_t j = 0; j < keys; j++) {
        v16_store(s + 16 * j, v16_exp2(v16_mul(v16_sub(v16_load(s + 16 * j), max), f)));
    }
    for (int64_t j = keys; j % 16; j++) {
        v16_store(s + 16 * j, v16_zero());
    }
    ZQ_UNROLL(16)
    for (int l = 0; l < 16; l++) {
        sum[l] = v16_load(s + 16 * l);
    }
    if (keys > 16) {
        for (int l = 0; l < 16; l++) {
            sum[l] = v16_add(sum[l], v16_load(s + 16 * (l + 16)));
        }
    }
    if (keys > 32) {
        for (int l = 0; l < 16; l++) {
            const v16 third = v16_load(s + 16 * (l + 32));
            sum[l] = v16_add(sum[l], keys > 48 ? v16_add(third, v16_load(s + 16 * (l + 48))) : third);
        }
    }
    ZQ_UNROLL(4)
    for (int half = 8; half >= 1; half /= 2) {
        ZQ_UNROLL(8)
        for (int l = 0; l < half; l++) {
            sum[l] = v16_add(sum[l], sum[l + half]);
        }
    }
    return sum[0];
}

/* Of FEW_ROWS query rows the first `rows`: out = P V / l, 16 nv columns. Returns the largest bits without sign of P V. */
ZQ_INLINE v16i
few_values(const float *p, int64_t keys, const float *v, int64_t ld_v, const float *inv, int64_t rows, float *out,
           int64_t ld_out, const int nv)
{
    v16 acc[FEW_ROWS][MATMUL_NV];
    v16i top = v16i_zero();
    ZQ_UNROLL(16)
    for (int r = 0; r < FEW_ROWS; r++) {
        ZQ_UNROLL(4)
        for (int c = 0; c < nv; c++) {
            acc[r][c] = v16_zero();
        }
    }
    for (int64_t j = 0; j < keys; j++) {
        v16 vj[MATMUL_NV];
        ZQ_UNROLL(4)
        for (int c = 0; c < nv; c++) {
            vj[c] = v16_load(v + j * ld_v + 16 * c);
        }
        ZQ_UNROLL(16)
        for (int r = 0; r < FEW_ROWS; r++) {
            const v16 pr = v16_set1(p[16 * j + r]);
            ZQ_UNROLL(4)
            for (int c = 0; c < nv; c++) {
                acc[r][c] = v16_fma(pr, vj[c], acc[r][c]);
            }
        }
    }
    ZQ_UNROLL(16)
    for (int r = 0; r < FEW_ROWS; r++) {
        if (r >= rows) {
            break;
        }
        ZQ_UNROLL(4)
        for (int c = 0; c < nv; c++) {
            top = v16i_max(top, v16_abs_bits(acc[r][c]));
            v16_store(out + r * ld_out + 16 * c, v16_add(v16_mul(acc[r][c], v16_set1(inv[r])), v16_zero()));
        }
    }
    return top;
}

/* Sixteen query rows, or all there are. Returns the largest bits without sign of l and P V. */
ZQ_INLINE v16i
attend_sixteen(const zq_few_keys *t, int64_t from, few_keys *w)
{
    const int64_t d = t->head_dim;
    int64_t ld;
    const float *q = whole_block(t->q, t->rows, d, t->ld_q, &from, 16, w->rows, &ld);
    few_queries(q, d, ld, w->q);
    v16 max = v16_set1(-INFINITY);
    for (int64_t j = 0; j < t->keys; j += FEW_BLOCK) {
        int64_t key = j;
        const float *k = whole_block(t->k, t->keys, d, t->ld_kv, &key, FEW_BLOCK, w->keys, &ld);
        max = few_scores(k, ld, d, w->q, w->s + 16 * key, max);
    }
    const v16 sum = few_softmax(w->s, t->keys, max, t->factor);
    v16i top = v16_abs_bits(sum);
    v16_store(w->inv, v16_div(v16_set1(1.0f), sum));
    const int64_t rows = zq_min(16, t->rows);
    for (int64_t r = 0; r < rows; r += FEW_ROWS) {
        float *out = t->out + (from + r) * t->ld_out;
        int64_t c = 0;
        for (; c + 16 * MATMUL_NV <= d; c += 16 * MATMUL_NV) {
            top = v16i_max(top, few_values(w->s + r, t->keys, t->v + c, t->ld_kv, w->inv + r, rows - r, out + c, t->ld_out,
                                           MATMUL_NV));
        }
        for (; c < d; c += 16) {
            top = v16i_max(top, few_values(w->s + r, t->keys, t->v + c, t->ld_kv, w->inv + r, rows - r, out + c, t->ld_out, 1));
        }
    }
    return top;
}

static int
attend_few_f32(const zq_few_keys *t)
{
    few_keys w;
    v16i top = v16i_zero();
    assert(t->keys >= 1 && t->keys <= ZQ_FEW_KEYS && t->head_dim % 16 == 0 && t->head_dim <= ZQ_FEW_DIM);
    for (int64_t i = 0; i < t->rows; i += 16) {
        top = v16i_max(top, attend_sixteen(t, i, &w));
    }
    return v16i_hmax(top) < 0x7f800000;
}

static void
fill_attention(zq_kernels *t)
{
    t->attend_few_f32 = attend_few_f32;
    t->softmax_tile_f32 = softmax_tile_f32;
    t->attend_tile_b8 = attend_tile_b8;
    t->quantize_heads_f32_b8 = quantize_heads_f32_b8;
    t->pack_rows_s8 = pack_rows_s8;
    t->pack_columns_f32_s8 = pack_columns_f32_s8;
    t->copy_rows_f32 = copy_rows_f32;
    t->divide_rows_f32 = divide_rows_f32;
    t->transpose_f32 = transpose_f32;
    t->matmul_f32 = matmul_f32;
    t->mr_matmul = MATMUL_MR;
}
