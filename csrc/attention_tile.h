/* What both forms of attention do with a tile of keys (attention.c, attention_kv.c): scores and the running softmax of
 * a row. attention.c has the equations. */
#ifndef ZQ_ATTENTION_TILE_H
#define ZQ_ATTENTION_TILE_H

#include "bad_row.h"
#include "ref/math.h"
#include "zq_kernels.h"

#include <float.h>

enum {
    ZQ_KEY_TILE = 256, /* keys: K and V tiles (2 x 32 KiB at 32 dimensions) stay in L2 */
    ZQ_PANEL = 32,     /* keys per panel of K^T: what one call of matmul_f32 reads, (head_dim, ZQ_PANEL) and contiguous */
    ZQ_ITEM_ROWS = 264 /* query rows per job: bringing in a tile is paid once per so many rows */
};

/* s (mr, keys) = Q K^T, rows ZQ_KEY_TILE apart; keys from a panel's first on. The keys that fill up the last vector are
 * computed too and never read. */
ZQ_INLINE void
zq_score_panels(const zq_kernels *K, const float *q, int64_t ld_q, int64_t mr, int64_t head_dim, const float *kt, int64_t keys,
                float *s)
{
    zq_tile tile = {.mr = (int)mr, .k = head_dim, .a = q, .lda = ld_q, .ldy = ZQ_KEY_TILE};
    for (int64_t key = 0; key < keys; key += ZQ_PANEL) {
        tile.nr = (int)zq_round_up(zq_min(ZQ_PANEL, keys - key), 16);
        tile.b = kt + key * head_dim;
        tile.y = s + key;
        K->matmul_f32(&tile, ZQ_PANEL, 0);
    }
}

/* Scores to p, and the row's m (-Inf before the first tile), l and o (dp floats) brought to the new maximum. */
ZQ_INLINE void
zq_softmax_step(const zq_kernels *K, float scale, float *s, int64_t keys, float *m, float *l, float *o, int64_t dp)
{
    const float old = *m, max = zq_maxf(old, K->max_f32(s, keys) * scale);
    const float sum = K->exp_sum_f32(s, keys, scale, max, s);
    const int first = old == -INFINITY;
    if (!first && max != old) {
        const float c = zq_exp(old - max);
        *l *= c;
        K->scale_f32(o, dp, c, o);
    }
    *m = max;
    *l = first ? sum : *l + sum;
}

/* The sequence whose jobs include `job`: first_job[s] <= job < first_job[s + 1]. */
ZQ_INLINE int64_t
zq_find_sequence(const int64_t *first_job, int64_t sequences, int64_t job)
{
    int64_t lo = 0, hi = sequences;
    while (hi - lo > 1) {
        const int64_t mid = lo + (hi - lo) / 2;
        *(first_job[mid] <= job ? &lo : &hi) = mid;
    }
    return lo;
}

#endif
