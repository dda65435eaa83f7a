/* Attention's kernels, scalar. Sums over keys run in the 64 partial sums of ref/nn.c. */
#include "../zq_kernels.h"
#include "attention.h"

/* m, l and o of row i brought to the maximum of this tile too; returns it. l lacks the tile's own sum. */
static float
raise_max(const zq_softmax_tile *t, int64_t i)
{
    const float old = t->max[i], max = zq_maxf(old, zq_max_f32__ref(t->s + i * t->lds, t->keys));
    if (max != old && old != -INFINITY) {
        const float c = zq_exp2((old - max) * t->factor[i]);
        t->sum[i] *= c;
        zq_scale_f32__ref(t->o + i * t->ldo, t->n, c, t->o + i * t->ldo);
    }
    t->max[i] = max;
    return max;
}

void
zq_softmax_tile_f32__ref(const zq_softmax_tile *t)
{
    for (int64_t i = 0; i < t->rows; i++) {
        const float max = raise_max(t, i), f = t->factor[i];
        float *s = t->s + i * t->lds, stripe[64] = {0};
        for (int64_t j = 0; j < t->keys; j++) {
            s[j] = zq_exp2((s[j] - max) * f);
            stripe[j % 64] += s[j];
        }
        for (int l = 0; l < 16; l++) {
            stripe[l] = (stripe[l] + stripe[l + 16]) + (stripe[l + 32] + stripe[l + 48]);
        }
        for (int half = 8; half >= 1; half /= 2) {
            for (int l = 0; l < half; l++) {
                stripe[l] += stripe[l + half];
            }
        }
        t->sum[i] += stripe[0];
    }
}

void
zq_copy_rows_f32__ref(const float *x, int64_t rows, int64_t n, int64_t ldx, float *y, int64_t ldy)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < zq_round_up(n, 16); c++) {
            y[r * ldy + c] = c < n ? x[r * ldx + c] : 0.0f;
        }
    }
}

void
zq_divide_rows_f32__ref(const float *x, int64_t rows, int64_t n, int64_t ldx, const float *l, float *y, int64_t ldy)
{
    for (int64_t r = 0; r < rows; r++) {
        const float f = 1.0f / l[r];
        for (int64_t j = 0; j < n; j++) {
            y[r * ldy + j] = x[r * ldx + j] * f + 0.0f;
        }
    }
}

void
zq_transpose_f32__ref(const float *x, int64_t rows, int64_t cols, int64_t ldx, float *y, int64_t ldy)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) {
            y[c * ldy + r] = x[r * ldx + c];
        }
    }
}

void
zq_matmul_f32__ref(const zq_tile *t, int64_t ldb, int64_t panel, int accumulate)
{
    const float *a = t->a;
    for (int64_t i = 0; i < t->mr; i++) {
        for (int64_t j = 0; j < t->nr; j++) {
            const float *b = (const float *)t->b + j / ZQ_NR * panel + j % ZQ_NR;
            float c = accumulate ? t->y[i * t->ldy + j] : 0.0f;
            for (int64_t k = 0; k < t->k; k++) {
                c = fmaf(a[i * t->lda + k], b[k * ldb], c);
            }
            t->y[i * t->ldy + j] = c;
        }
    }
}

/* One query row. */
static int
attend_row(const zq_few_keys *t, const float *q, float *out)
{
    float s[ZQ_FEW_KEYS], max = -INFINITY, sum = 0.0f;
    for (int64_t j = 0; j < t->keys; j++) {
        s[j] = 0.0f;
        for (int64_t i = 0; i < t->head_dim; i++) {
            s[j] = fmaf(q[i], t->k[j * t->ld_kv + i], s[j]);
        }
    }
    const zq_softmax_tile softmax = {.s = s, .rows = 1, .keys = t->keys, .factor = &t->factor, .max = &max, .sum = &sum};
    zq_softmax_tile_f32__ref(&softmax);
    for (int64_t i = 0; i < t->head_dim; i++) {
        out[i] = 0.0f;
        for (int64_t j = 0; j < t->keys; j++) {
            out[i] = fmaf(s[j], t->v[j * t->ld_kv + i], out[i]);
        }
    }
    const int finite = zq_is_finite(sum) && zq_is_finite(zq_absmax_f32__ref(out, t->head_dim));
    zq_divide_rows_f32__ref(out, 1, t->head_dim, t->ld_out, &sum, out, t->ld_out);
    return finite;
}

int
zq_attend_few_f32__ref(const zq_few_keys *t)
{
    int finite = 1;
    for (int64_t r = 0; r < t->rows; r++) {
        finite &= attend_row(t, t->q + r * t->ld_q, t->out + r * t->ld_out);
    }
    return finite;
}

/* Scores of one lane: its codes of q lie in every fourth of 4 * 32 bytes. */
static float
code_scores(const zq_code_tile *t, int64_t lane, float max)
{
    for (int64_t j = 0; j < t->keys; j++) {
        int32_t c = t->start[lane];
        for (int64_t i = 0; i < t->d4; i++) {
            c += t->k[j * t->d4 + i] * (int8_t)t->q[(i / 4 * ZQ_NR + lane) * 4 + i % 4];
        }
        t->s[j] = (float)c * t->k_scale[j];
        max = zq_maxf(max, t->s[j]);
    }
    return max;
}

void
zq_attend_tile_b8__ref(const zq_code_tile *t)
{
    const int64_t keys4 = zq_round_up(t->keys, 4);
    for (int64_t lane = 0; lane < t->rows; lane++) {
        const float old = t->max[lane], f = t->factor[lane], max = code_scores(t, lane, old);
        const float c = old == -INFINITY ? 0.0f : zq_exp2((old - max) * f);
        uint32_t sum = 0;
        for (int64_t j = 0; j < keys4; j++) {
            t->p[j] = j < t->keys ? (uint8_t)zq_bits(zq_exp2_code((t->s[j] - max) * f)) : 0;
            sum += t->p[j];
        }
        for (int64_t i = 0; i < t->n; i++) {
            const int8_t *v = (const int8_t *)t->v + i / ZQ_NR * ZQ_NR * keys4 + i % ZQ_NR * 4;
            float *o = t->o + lane * t->n + i;
            int32_t product = 0;
            for (int64_t j = 0; j < keys4; j++) {
                product += t->p[j] * v[j / 4 * 4 * ZQ_NR + j % 4];
            }
            *o = fmaf((float)product, t->v_scale[i], old == -INFINITY ? 0.0f : *o * c);
        }
        t->sum[lane] = t->sum[lane] * c + (float)(int32_t)sum;
        t->max[lane] = max;
    }
}

void
zq_quantize_heads_f32_b8__ref(const float *x, int64_t rows, int64_t n, int64_t ldx, int bias, uint8_t *q, int64_t ldq,
                              float *scale)
{
    for (int64_t i = 0; i < rows; i++, x += ldx, q += ldq) {
        const float inv = zq_code_scale(zq_absmax_f32__ref(x, n), &scale[i]);
        for (int64_t j = 0; j < zq_round_up(n, 4); j++) {
            q[j] = (uint8_t)((uint32_t)zq_small_rint(j < n ? x[j] * inv : 0.0f) + (uint32_t)bias);
        }
    }
}

void
zq_pack_rows_s8__ref(const uint8_t *q, int64_t rows, int64_t n, uint8_t *panels, int32_t *colsum)
{
    for (int64_t i = 0; i < rows; i++, q += n) {
        uint8_t *column = panels + i / ZQ_NR * ZQ_NR * n + i % ZQ_NR * 4;
        int32_t sum = 0;
        for (int64_t k = 0; k < n; k++) {
            column[k / 4 * 4 * ZQ_NR + k % 4] = q[k];
            sum += (int8_t)q[k];
        }
        colsum[i] = -128 * sum;
    }
}

void
zq_pack_columns_f32_s8__ref(const float *x, int64_t rows, int64_t n, int64_t ldx, uint8_t *q, float *scale)
{
    const int64_t rows4 = zq_round_up(rows, 4);
    for (int64_t j = 0; j < zq_round_up(n, ZQ_NR); j++) {
        uint32_t top = 0;
        float absmax;
        for (int64_t k = 0; j < n && k < rows; k++) {
            const uint32_t bits = zq_bits(fabsf(x[k * ldx + j]));
            top = bits > top ? bits : top;
        }
        memcpy(&absmax, &top, sizeof absmax);
        const float inv = zq_code_scale(absmax, &scale[j]);
        uint8_t *column = q + j / ZQ_NR * ZQ_NR * rows4 + j % ZQ_NR * 4;
        for (int64_t k = 0; k < rows4; k++) {
            column[k / 4 * 4 * ZQ_NR + k % 4] = (uint8_t)zq_small_rint(k < rows && j < n ? x[k * ldx + j] * inv : 0.0f);
        }
    }
}
