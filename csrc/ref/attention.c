/* Attention's kernels, scalar. Sums over keys run in the 64 partial sums of ref/nn.c. */
#include "../zq_kernels.h"
#include "exp2.h"

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
