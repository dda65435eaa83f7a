/* Attention's kernels on v16: what ref/attention.c does, sixteen lanes at a time. Included by nn_avx2.c and nn_avx512.c
 * behind nn.inc.h, with MATMUL_MR and MATMUL_NV set to the register tile of the level. */
#include "../ref/exp2.h"

ZQ_INLINE v16
v16_exp2(v16 t)
{
    t = v16_max(v16_set1(ZQ_EXP2_LO), t);
    const v16 k = v16_add(t, v16_set1(ZQ_EXP2_MAGIC)), r = v16_sub(t, v16_sub(k, v16_set1(ZQ_EXP2_MAGIC)));
    v16 p = v16_set1(zq_exp2_poly[5]);
#pragma GCC unroll 8
    for (int i = 4; i >= 0; i--) {
        p = v16_fma(p, r, v16_set1(zq_exp2_poly[i]));
    }
    return v16_mul(p, v16_from_bits(v16i_shl(v16_bits(k), 23)));
}

/* m, l and o of the rows brought to the maximum of this tile too. l lacks the tile's own sum. A loop of its own, and so are
 * the three below: horizontal steps have long latencies, and only rows side by side hide them. */
static void
raise_max(const zq_softmax_tile *t)
{
    for (int64_t i = 0; i < t->rows; i++) {
        const float old = t->max[i], max = zq_maxf(old, max_f32(t->s + i * t->lds, t->keys));
        t->max[i] = max;
        if (max != old && old != -INFINITY) {
            const float c = zq_exp2((old - max) * t->factor[i]);
            t->sum[i] *= c;
            scale_f32(t->o + i * t->ldo, t->n, c, t->o + i * t->ldo);
        }
    }
}

/* p of one row; returns its sums in the lanes. */
ZQ_INLINE v16
exp2_row(float *s, int64_t keys, v16 max, v16 f)
{
    v16 sum[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    int64_t j = 0;
    for (; j + 64 <= keys; j += 64) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
            const v16 p = v16_exp2(v16_mul(v16_sub(v16_load(s + j + 16 * u), max), f));
            v16_store(s + j + 16 * u, p);
            sum[u] = v16_add(sum[u], p);
        }
    }
#pragma GCC unroll 4
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

static void
softmax_tile_f32(const zq_softmax_tile *t)
{
    float lanes[MATMUL_MR][16];
    assert(t->rows <= MATMUL_MR);
    raise_max(t);
    for (int64_t i = 0; i < t->rows; i++) {
        v16_store(lanes[i], exp2_row(t->s + i * t->lds, t->keys, v16_set1(t->max[i]), v16_set1(t->factor[i])));
    }
    for (int64_t i = 0; i < t->rows; i++) {
        t->sum[i] += v16_hsum(v16_load(lanes[i]));
    }
}

/* 8 x 8 floats: pairs, then quads, then the 128-bit halves. */
ZQ_INLINE void
transpose_8x8(const float *x, int64_t ldx, float *y, int64_t ldy)
{
    __m256 r[8], p[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        r[i] = _mm256_loadu_ps(x + i * ldx);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        p[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        p[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(p[i], p[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(p[i], p[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(p[i + 1], p[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(p[i + 1], p[i + 3], 0xee);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(y + i * ldy, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(y + (i + 4) * ldy, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
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

/* mr x 16 nv accumulators stay in registers; mr and nv are constants in every call. */
ZQ_INLINE void
matmul_tile(const zq_tile *t, int64_t col, int64_t ldb, int accumulate, const int mr, const int nv)
{
    const float *a = t->a, *b = (const float *)t->b + col;
    const int64_t lda = t->lda, ldc = t->ldy, depth = t->k;
    float *c = t->y + col;
    v16 acc[MATMUL_MR][MATMUL_NV];
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) {
            acc[i][j] = accumulate ? v16_load(c + i * ldc + 16 * j) : v16_zero();
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        v16 bk[MATMUL_NV];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) {
            bk[j] = v16_load(b + k * ldb + 16 * j);
            if (mr <= 8) { /* so few rows wait for memory: a decoding step reads every page of keys once */
                _mm_prefetch((const char *)(b + (k + 12) * ldb + 16 * j), _MM_HINT_T0);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < mr; i++) {
            const v16 aik = v16_set1(a[i * lda + k]);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) {
                acc[i][j] = v16_fma(aik, bk[j], acc[i][j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++) {
#pragma GCC unroll 4
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

static void
fill_attention(zq_kernels *t)
{
    t->softmax_tile_f32 = softmax_tile_f32;
    t->transpose_f32 = transpose_f32;
    t->matmul_f32 = matmul_f32;
    t->mr_matmul = MATMUL_MR;
}
