/* What the files of lkd share. */
#ifndef ZQ_LKD_BLOCK_H
#define ZQ_LKD_BLOCK_H

#include "../bad_row.h"
#include "lkd.h"

/* Rows that a linear layer reads: float32, or codes with a scale and a zero point each. */
typedef struct {
    float *f; /* (tokens, k), or NULL */
    uint8_t *q;
    int64_t ld_q;
    float *scale;
    int32_t *zero;
} lkd_rows;

/* A linear layer. The codes are made at the beginning of each forward pass. */
typedef struct {
    int64_t n, k, groups;
    zq_lkd_spec spec;
    int64_t parts[ZQ_LKD_PARTS]; /* rows that spec.rows are about */
    float *w;
    const float *bias; /* or NULL */
    float *dw, *dbias;
    int8_t *codes; /* (n, k); NULL in float32 */
    float *scales; /* (n, groups) */
    int fixed;     /* they were given */
    zq_linear packed; /* w or the codes, for y = x w^T + bias */
} lkd_linear;

struct zq_lkd {
    zq_lkd_shape s;
    int64_t q, kv, qkv; /* columns: heads * head_dim, kv_heads * head_dim, q + 2 kv */
    int64_t count, weights; /* floats of all tensors, and of the weights of linear layers, which come first */
    int64_t first[ZQ_LKD_TENSORS]; /* of a tensor, -1 where there is none */
    float *values[ZQ_LKD_KINDS];   /* all tensors, one behind the other, in whole cache lines */
    lkd_linear linear[ZQ_LKD_LINEARS];
    float *cos, *sin, *minus_sin; /* (positions, half) */
    float *zeros;                 /* bias of products without one */
    int64_t steps;
    zq_stop *stop; /* of the call that runs, or NULL; each call brings its own */
    /* what a batch needs, for up to `capacity` tokens, in one piece of memory; attention's jobs have their own */
    void *memory;
    int64_t capacity, bytes;
    int32_t *position; /* (tokens): in its sequence */
    lkd_rows in1, in2, in3, in4; /* of qkv, o, gate and up, down */
    float *qk_in;                /* (tokens, q + kv) what the norms of q and k read; only with these */
    float *qkv_out, *gate, *up;  /* after the backward pass of the activation: the gradients of gate and up */
    float *sum1, *h, *sum2;      /* (tokens, d); h and sum2 in post order only */
    float *wide;                 /* (tokens, max(ff, q)): attention's output or the activation, and the gradients of in4, in2 */
    float *dqkv, *dy, *dh, *dn;
    float *dyt;     /* a gradient transposed, rows ld_dyt apart */
    int64_t ld_dyt;
    float *panels;  /* the packed operand of a backward product */
    float *partial; /* (chunks, 2, d or head_dim): sums over some rows each */
    double *chunk_loss;
};

enum { LKD_CHUNK = 64 }; /* rows of a job, and of a partial sum: never a matter of the number of threads */

/* ---- lkd_linear.c ---- */
zq_status lkd_linear_init(lkd_linear *l);
void lkd_linear_free(lkd_linear *l);
/* Codes of w and everything made of them. */
zq_status lkd_linear_codes(lkd_linear *l, int64_t *bad_row);
zq_status lkd_linear_prepare(zq_lkd *b, lkd_linear *l, int64_t *bad_row);
/* y (tokens, n) = x w^T + bias + residual; residual may be NULL. */
zq_status lkd_linear_forward(const zq_lkd *b, const lkd_linear *l, const lkd_rows *x, int64_t tokens, const float *residual,
                             float *y);
/* dx (tokens, k) = dy w + residual */
zq_status lkd_linear_dx(zq_lkd *b, const lkd_linear *l, const float *dy, int64_t tokens, const float *residual, float *dx);
/* dw = dy^T x, dbias = sum of the rows of dy */
zq_status lkd_linear_dw(zq_lkd *b, const lkd_linear *l, const float *dy, const lkd_rows *x, int64_t tokens);

/* ---- lkd_attention.c: out (tokens, q) from b->qkv_out; b->dqkv from dout ---- */
zq_status lkd_attention(zq_lkd *b, const zq_lkd_batch *batch, float *out, int64_t *bad_row);
zq_status lkd_attention_grad(zq_lkd *b, const zq_lkd_batch *batch, const float *dout, int64_t *bad_row);

/* ---- lkd_rows.c ---- */
/* Between the product and attention: q and k of b->qkv_out through their norms and turned; b->dqkv back. */
zq_status lkd_heads(zq_lkd *b, int64_t tokens, int64_t *bad_row);
void lkd_heads_grad(zq_lkd *b, int64_t tokens);
/* dx = add + gradient through norm `tensor` (NORM1, NORM2) at x; its gradients are stored. dx may be add or dy. */
void lkd_norm_grad(zq_lkd *b, int tensor, const float *x, const float *dy, int64_t tokens, const float *add, float *dx);
/* wide: the gradient of the activation's result; gate and up become theirs */
void lkd_activation_grad(zq_lkd *b, int64_t tokens);
/* y becomes the gradient of the loss, which is returned. */
double lkd_loss(zq_lkd *b, float *y, const float *target, int64_t tokens, double kl);
void lkd_adamw(zq_lkd *b, const zq_lkd_options *o);

#endif
