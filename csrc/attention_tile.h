/* What both forms of attention do with a tile of keys (attention.c, attention_kv.c). attention.c has the equations. */
#ifndef ZQ_ATTENTION_TILE_H
#define ZQ_ATTENTION_TILE_H

#include "bad_row.h"
#include "ref/attention.h"
#include "zq_kernels.h"

#include <float.h>

enum {
    ZQ_KEY_TILE = 256, /* keys: K and V tiles (2 x 32 KiB at 32 dimensions) stay in L2 */
    ZQ_SCORE_PITCH = ZQ_KEY_TILE + 16, /* of a row of scores: a power of two would put all rows into few sets of L1 */
    ZQ_PANEL = 32      /* keys per panel of K^T: (head_dim, ZQ_PANEL) and contiguous, as matmul_f32 reads it */
};

/* s (mr, keys) = Q K^T, rows ZQ_SCORE_PITCH apart; keys from a panel's first on. The keys that fill up the last vector are
 * computed too and never read. */
ZQ_INLINE void
zq_score_panels(const zq_kernels *K, const float *q, int64_t ld_q, int64_t mr, int64_t head_dim, const float *kt, int64_t keys,
                float *s)
{
    const zq_tile tile = {.mr = (int)mr, .nr = (int)zq_round_up(keys, 16), .k = head_dim, .a = q, .lda = ld_q, .b = kt,
                          .y = s, .ldy = ZQ_SCORE_PITCH};
    K->matmul_f32(&tile, ZQ_PANEL, ZQ_PANEL * head_dim, 0);
}

/* The softmax of `rows` rows before their first tile. */
ZQ_INLINE void
zq_begin_softmax(int64_t rows, float factor, float *max, float *sum, float *factors)
{
    for (int64_t r = 0; r < rows; r++) {
        max[r] = -INFINITY;
        sum[r] = 0.0f;
        factors[r] = factor;
    }
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
