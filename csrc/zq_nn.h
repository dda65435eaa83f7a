/* Transformer operators other than linear layers, threaded over rows (norm.c, attention.c). Included by zq.h. */
#ifndef ZQ_NN_H
#define ZQ_NN_H

#include <stdint.h>

/* Where a row operator puts its rows: float32, token codes, or both. As in zq_out: rows of ld_q >= n bytes, whose
 * slack is zeroed. */
typedef struct {
    float *y; /* (m, n) or NULL */
    zq_quant quant; /* NONE, TOKEN_SYM or TOKEN_ASYM */
    uint8_t *q;
    int64_t ld_q;
    float *q_scale;
    int32_t *q_zero;
} zq_rows_out;

/* A row of x that holds NaN or Inf, or whose result cannot be quantized because it overflowed, is ZQ_ENONFINITE, and
 * *bad_row the first such row. Outputs are then undefined. y may be x. */

/* h = x (+ residual); y = (h - mean) / sqrt(var + eps) * gamma + beta, per row of n; gamma and beta are finite. */
zq_status zq_layernorm(const float *x, const float *residual, const float *gamma, const float *beta, int64_t m, int64_t n,
                       float eps, const zq_rows_out *out, int64_t *bad_row);
zq_status zq_rmsnorm(const float *x, const float *residual, const float *gamma, int64_t m, int64_t n, float eps,
                     const zq_rows_out *out, int64_t *bad_row);
zq_status zq_activate(const float *x, int64_t m, int64_t n, zq_activation act, const zq_rows_out *out, int64_t *bad_row);
/* act(gate) * up */
zq_status zq_gated(const float *gate, const float *up, int64_t m, int64_t n, zq_activation act, const zq_rows_out *out,
                   int64_t *bad_row);
/* exp(x - max x) / sum per row. -Inf is allowed and gives 0; a row of nothing but -Inf gives zeros. Codes are rounded once, from
 * exp(x - max x) times 127 or 255, and come without y. */
zq_status zq_softmax(const float *x, int64_t m, int64_t n, const zq_rows_out *out, int64_t *bad_row);

enum { ZQ_INT8_HEAD_MAX = 65536 }; /* the products of a head's codes add up within int32 */

/* Multi-head attention over ragged sequences, float32: softmax(q k^T * scale + mask) v per head, online over key
 * tiles (no (T, T) matrix). Sequence s owns rows offsets[s] .. offsets[s+1]-1 of q, k, v and out. q, k, v have row
 * strides ld_q, ld_kv (slices of one fused qkv matrix are fine); head h is columns h*d .. h*d+d-1. key_mask: one byte
 * per row, 0 = this key is hidden: as if its row were not there, bit for bit; or NULL. A query whose keys are all
 * hidden gets zeros. scale > 0. int8_rows: in sequences of at least so many rows (0: in none) both products are of 8-bit
 * codes (attention.c has the scheme), and |k| beyond 1e27 is refused. ZQ_ENONFINITE: NaN or Inf came in, or scores
 * overflowed; *bad_row is the query's row. */
typedef struct {
    const float *q, *k, *v;
    int64_t ld_q, ld_kv;
    const int64_t *offsets; /* (sequences + 1) */
    int64_t sequences;
    int64_t heads, head_dim;
    float scale;
    const uint8_t *key_mask;
    int64_t int8_rows; /* not 0: head_dim <= ZQ_INT8_HEAD_MAX */
    float *out; /* (rows, heads * head_dim) */
    int64_t ld_out;
} zq_attention_args;
zq_status zq_attention(const zq_attention_args *a, int64_t *bad_row);

#endif
