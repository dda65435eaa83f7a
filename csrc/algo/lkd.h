/* Training of one Transformer block with fake-quantized weights and activations (lkd.c): forward, backward and AdamW.
 *
 * Gradients go straight through the quantizers: d fq(v) / d v = 1. Scales are taken from the values of each step, so nothing
 * is ever clipped, and they have no gradient of their own. Where the scales of a weight are given, it is held within what its
 * codes can say: each forward pass first sets what lies beyond back to the border. */
#ifndef ZQ_LKD_H
#define ZQ_LKD_H

#include "../zq_kernels.h"

/* The linear layers; qkv is (heads + 2 kv_heads) head_dim rows: all of q, all of k, all of v. */
enum { ZQ_LKD_QKV, ZQ_LKD_O, ZQ_LKD_GATE, ZQ_LKD_UP, ZQ_LKD_DOWN, ZQ_LKD_LINEARS };

/* The tensors: the weights of the linear layers, their biases in the same order, the norms. */
enum {
    ZQ_LKD_BIAS = ZQ_LKD_LINEARS,
    ZQ_LKD_NORM1 = 2 * ZQ_LKD_LINEARS,
    ZQ_LKD_NORM1_BIAS,
    ZQ_LKD_NORM2,
    ZQ_LKD_NORM2_BIAS,
    ZQ_LKD_Q_NORM,
    ZQ_LKD_K_NORM,
    ZQ_LKD_TENSORS
};

/* post:     h = norm1(x + attention(x)),      y = norm2(h + ffn(h))
 * pre:      h = x + attention(norm1(x)),      y = h + ffn(norm2(h))
 * parallel: y = x + attention(norm1(x)) + ffn(norm2(x)) */
typedef enum { ZQ_LKD_POST, ZQ_LKD_PRE, ZQ_LKD_PARALLEL, ZQ_LKD_ORDERS } zq_lkd_order;

enum { ZQ_LKD_PARTS = 3 }; /* of qkv: q, k and v */

typedef struct {
    int bits;                   /* of the weight's codes, 2..8, symmetric; 0: float32 */
    int64_t group;              /* inputs per scale: a multiple of 8, or at least all of them */
    int64_t rows[ZQ_LKD_PARTS]; /* rows per scale, more than one only with one group: of q, k and v; or of all rows, 0, 0 */
    /* of what the layer reads: NONE, TOKEN_SYM, TOKEN_ASYM; NONE where bits is 0; the same for gate and up */
    zq_quant act;
} zq_lkd_spec;

typedef struct {
    int64_t d, heads, kv_heads, head_dim, ff;
    zq_lkd_order order;
    int rms;     /* RMSNorm, without biases; else LayerNorm */
    int qk_norm; /* RMSNorm of every head of q and k, before the rotary embedding */
    zq_activation act;
    int gated, causal;
    int64_t window; /* keys that a query sees at most, itself included; 0: all */
    float scale, eps;
    int64_t positions, half; /* rotary embedding of the first 2 half features of a head; half 0: none */
    const float *cos, *sin;  /* (positions, half), copied */
    int interleaved;         /* which two features make a pair: see zq_rope */
    int has_bias[ZQ_LKD_LINEARS];
    zq_lkd_spec spec[ZQ_LKD_LINEARS];
} zq_lkd_shape;

/* Packed sequences: sequence s is rows offsets[s] .. offsets[s + 1] - 1 of x (offsets[sequences], d). */
typedef struct {
    const float *x;
    const int64_t *offsets;
    int64_t sequences; /* with a row at least, all together */
    zq_stop *stop; /* of the call that computes with it, or NULL */
} zq_lkd_batch;

typedef struct {
    double lr, beta1, beta2, eps, decay; /* decay: of the weights of linear layers only */
    double kl;                           /* loss: mean (y - target)^2 + kl * mean over rows of KL(target || y) */
} zq_lkd_options;

typedef struct zq_lkd zq_lkd;

/* Which values of a tensor. */
typedef enum { ZQ_LKD_VALUE, ZQ_LKD_GRADIENT, ZQ_LKD_FIRST, ZQ_LKD_SECOND, ZQ_LKD_KINDS } zq_lkd_kind;

/* A block whose values are all 0. */
zq_status zq_lkd_new(const zq_lkd_shape *shape, zq_lkd **out);
void zq_lkd_free(zq_lkd *b);
int64_t zq_lkd_width(const zq_lkd *b);
int64_t zq_lkd_positions(const zq_lkd *b); /* that its rotary tables have; 0 without */
int64_t zq_lkd_bytes(const zq_lkd *b);
/* The tensor's memory, which stays where it is, and its shape (rows, cols), rows 0 for vectors. NULL: the block has none. */
float *zq_lkd_tensor(zq_lkd *b, zq_lkd_kind kind, int tensor, int64_t dims[2]);
/* Codes (n, k) and scales (n, groups) of a weight as it is now, NULL in float32. ZQ_ENONFINITE: *bad_row. */
int64_t zq_lkd_groups(const zq_lkd *b, int linear);
zq_status zq_lkd_codes(zq_lkd *b, int linear, const int8_t **codes, const float **scales, int64_t *bad_row);
/* Scales (n, groups) for that weight, normal numbers > 0, from now on. Not of a weight in float32. */
void zq_lkd_fix_scales(zq_lkd *b, int linear, const float *scales);
/* AdamW's step count, of which the first step is 1; it is part of the state, as the moments are. */
int64_t *zq_lkd_steps(zq_lkd *b);

/* What went wrong where the status is ZQ_ENONFINITE: a weight, or something that was computed. */
typedef enum { ZQ_LKD_IN_WEIGHT, ZQ_LKD_IN_RESULT } zq_lkd_fault;

/* y = block(x). ZQ_ENONFINITE: *fault says where; *bad_row is the row of a weight. x and target are to be finite.
 * ZQ_ESTOPPED, from all three: batch->stop said so; y, dx and the gradients are anything, parameters, moments and steps what they
 * were, but for weights that were beyond what their given scales can say: those may be at the border already. */
zq_status zq_lkd_forward(zq_lkd *b, const zq_lkd_batch *batch, float *y, zq_lkd_fault *fault, int64_t *bad_row);
/* Gradients of sum(dy y) by every parameter and, unless dx is NULL, by x. */
zq_status zq_lkd_gradients(zq_lkd *b, const zq_lkd_batch *batch, const float *dy, float *dx, zq_lkd_fault *fault,
                           int64_t *bad_row);
/* One step of AdamW on the loss; *loss is that before the step. Where something is not finite, no parameter changes. The stop is
 * not asked any more once parameters do. */
zq_status zq_lkd_step(zq_lkd *b, const zq_lkd_batch *batch, const float *target, const zq_lkd_options *o, double *loss,
                      zq_lkd_fault *fault, int64_t *bad_row);

#endif
