/* A Transformer block in training: its memory, and the order of its operators forward and backward.
 *
 * What the backward pass needs is kept in float32, but for the inputs of linear layers whose activations are quantized: those
 * are kept as codes. Everything lies in one piece of memory, which only grows; attention's jobs have some of their own. All sums
 * run in an order that depends on the shapes alone, so a step's bits depend neither on the number of threads nor on the dispatch
 * level.
 *
 * A block of a large model takes seconds for a step, nearly all of them in products and attention: these ask the call's stop, and
 * what lies between two of them is a matter of milliseconds, or of one pass over the parameters. */
#include "lkd_block.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define TRY(expression)                       \
    do {                                      \
        const zq_status status_ = expression; \
        if (status_ != ZQ_OK) {               \
            return status_;                   \
        }                                     \
    } while (0)

/* ---- parameters ------------------------------------------------------------------------------------- */

/* Rows (0: a vector) and columns of a tensor; 0 and 0: there is none. */
static void
tensor_shape(const zq_lkd *b, int tensor, int64_t dims[2])
{
    const zq_lkd_shape *s = &b->s;
    const int64_t n[] = {b->qkv, s->d, s->gated ? s->ff : 0, s->ff, s->d}, k[] = {s->d, b->q, s->d, s->d, s->ff};
    const int i = tensor % ZQ_LKD_LINEARS, of_heads = tensor >= ZQ_LKD_Q_NORM, norm = tensor >= ZQ_LKD_NORM1;
    const int there = of_heads ? s->qk_norm
                      : norm   ? !s->rms || (tensor - ZQ_LKD_NORM1) % 2 == 0
                               : n[i] > 0 && (tensor < ZQ_LKD_BIAS || s->has_bias[i]);
    dims[0] = there && tensor < ZQ_LKD_BIAS ? n[i] : 0;
    dims[1] = !there ? 0 : of_heads ? s->head_dim : norm ? s->d : tensor < ZQ_LKD_BIAS ? k[i] : n[i];
}

static int64_t
tensor_items(const zq_lkd *b, int tensor)
{
    int64_t dims[2];
    tensor_shape(b, tensor, dims);
    return zq_max(dims[0], 1) * dims[1];
}

static zq_status
new_parameters(zq_lkd *b)
{
    for (int t = 0; t < ZQ_LKD_TENSORS; t++) {
        const int64_t items = tensor_items(b, t);
        b->first[t] = items ? b->count : -1;
        b->count += zq_round_up(items, 16);
        b->weights = t < ZQ_LKD_BIAS ? b->count : b->weights;
    }
    for (int kind = 0; kind < ZQ_LKD_KINDS; kind++) {
        b->values[kind] = zq_alloc((size_t)b->count * sizeof(float));
        if (!b->values[kind]) {
            return ZQ_ENOMEM;
        }
        memset(b->values[kind], 0, (size_t)b->count * sizeof(float));
    }
    return ZQ_OK;
}

static float *
values_of(zq_lkd *b, zq_lkd_kind kind, int tensor)
{
    return b->first[tensor] < 0 ? NULL : b->values[kind] + b->first[tensor];
}

static zq_status
new_linears(zq_lkd *b)
{
    for (int i = 0; i < ZQ_LKD_LINEARS; i++) {
        lkd_linear *l = &b->linear[i];
        int64_t dims[2];
        tensor_shape(b, i, dims);
        if (dims[0] == 0) {
            continue;
        }
        *l = (lkd_linear){.n = dims[0], .k = dims[1], .spec = b->s.spec[i], .w = values_of(b, ZQ_LKD_VALUE, i),
                          .bias = values_of(b, ZQ_LKD_VALUE, ZQ_LKD_BIAS + i), .dw = values_of(b, ZQ_LKD_GRADIENT, i),
                          .dbias = values_of(b, ZQ_LKD_GRADIENT, ZQ_LKD_BIAS + i)};
        l->groups = zq_ceil_div(l->k, zq_min(l->spec.group, l->k));
        l->parts[0] = l->spec.rows[1] ? b->q : l->n;
        l->parts[1] = l->parts[2] = l->spec.rows[1] ? b->kv : 0;
        TRY(lkd_linear_init(l));
    }
    return ZQ_OK;
}

static zq_status
new_tables(zq_lkd *b)
{
    const int64_t items = b->s.positions * b->s.half;
    b->cos = zq_alloc((size_t)(3 * items) * sizeof(float));
    if (!b->cos) {
        return ZQ_ENOMEM;
    }
    b->sin = b->cos + items;
    b->minus_sin = b->sin + items;
    for (int64_t i = 0; i < items; i++) {
        b->cos[i] = b->s.cos[i];
        b->sin[i] = b->s.sin[i];
        b->minus_sin[i] = -b->s.sin[i];
    }
    return ZQ_OK;
}

zq_status
zq_lkd_new(const zq_lkd_shape *shape, zq_lkd **out)
{
    zq_lkd *b = zq_alloc(sizeof *b);
    *out = NULL;
    if (!b) {
        return ZQ_ENOMEM;
    }
    *b = (zq_lkd){.s = *shape, .q = shape->heads * shape->head_dim, .kv = shape->kv_heads * shape->head_dim};
    b->qkv = b->q + 2 * b->kv;
    zq_status s = new_parameters(b);
    s = s == ZQ_OK ? new_linears(b) : s;
    s = s == ZQ_OK ? new_tables(b) : s;
    if (s != ZQ_OK) {
        zq_lkd_free(b);
        return s;
    }
    *out = b;
    return ZQ_OK;
}

void
zq_lkd_free(zq_lkd *b)
{
    for (int kind = 0; kind < ZQ_LKD_KINDS; kind++) {
        zq_free(b->values[kind]);
    }
    for (int i = 0; i < ZQ_LKD_LINEARS; i++) {
        lkd_linear_free(&b->linear[i]);
    }
    zq_free(b->cos);
    zq_free(b->memory);
    zq_free(b);
}

int64_t
zq_lkd_width(const zq_lkd *b)
{
    return b->s.d;
}

int64_t
zq_lkd_positions(const zq_lkd *b)
{
    return b->s.half ? b->s.positions : 0;
}

int64_t
zq_lkd_bytes(const zq_lkd *b)
{
    int64_t bytes = b->bytes + ZQ_LKD_KINDS * b->count * (int64_t)sizeof(float);
    for (int i = 0; i < ZQ_LKD_LINEARS; i++) {
        const lkd_linear *l = &b->linear[i];
        bytes += l->n ? zq_linear_bytes(&l->packed) + (l->codes ? l->n * (l->k + l->groups * 4) : 0) : 0;
    }
    return bytes;
}

float *
zq_lkd_tensor(zq_lkd *b, zq_lkd_kind kind, int tensor, int64_t dims[2])
{
    tensor_shape(b, tensor, dims);
    return values_of(b, kind, tensor);
}

int64_t *
zq_lkd_steps(zq_lkd *b)
{
    return &b->steps;
}

int64_t
zq_lkd_groups(const zq_lkd *b, int linear)
{
    return b->linear[linear].groups;
}

void
zq_lkd_fix_scales(zq_lkd *b, int linear, const float *scales)
{
    lkd_linear *l = &b->linear[linear];
    memcpy(l->scales, scales, (size_t)(l->n * l->groups) * sizeof *scales);
    l->fixed = 1;
}

zq_status
zq_lkd_codes(zq_lkd *b, int linear, const int8_t **codes, const float **scales, int64_t *bad_row)
{
    lkd_linear *l = &b->linear[linear];
    *codes = l->codes;
    *scales = l->scales;
    return l->codes ? lkd_linear_codes(l, bad_row) : ZQ_OK;
}

/* ---- memory of a batch ------------------------------------------------------------------------------ */

/* The next items of `size` bytes, in whole cache lines; NULL while sizes are counted. */
static void *
take(char *base, int64_t *at, int64_t items, size_t size)
{
    void *p = base ? base + *at : NULL;
    *at += zq_round_up(items * (int64_t)size, 64);
    return p;
}

static float *
take_floats(char *base, int64_t *at, int64_t items)
{
    return take(base, at, items, sizeof(float));
}

static lkd_rows
take_rows(char *base, int64_t *at, int64_t tokens, int64_t k, zq_quant quant)
{
    lkd_rows r = {0};
    if (quant == ZQ_QUANT_NONE) {
        r.f = take_floats(base, at, tokens * k);
        return r;
    }
    r.ld_q = zq_row_pitch(k);
    r.q = take(base, at, tokens * r.ld_q, 1);
    r.scale = take_floats(base, at, tokens);
    r.zero = take(base, at, tokens, sizeof *r.zero);
    return r;
}

/* Floats of the widest packed operand: a weight (dx), the inputs of a layer (dw), or a weight before it is packed. */
static int64_t
panel_floats(const zq_lkd *b, int64_t tokens)
{
    int64_t most = 0;
    for (int i = 0; i < ZQ_LKD_LINEARS; i++) {
        const lkd_linear *l = &b->linear[i];
        most = zq_max(most, zq_round_up(l->k, ZQ_NR) * zq_max(l->n, tokens));
    }
    return most;
}

/* Pointers into base for `tokens` rows; returns the bytes that takes. */
static int64_t
lay_out(zq_lkd *b, char *base, int64_t tokens)
{
    const zq_lkd_shape *s = &b->s;
    const int64_t d = tokens * s->d, post = s->order == ZQ_LKD_POST, chunks = zq_ceil_div(tokens, LKD_CHUNK);
    const int64_t widest = zq_max(zq_max(b->qkv, s->d), s->ff), normed = zq_max(s->d, s->qk_norm ? s->head_dim : 0);
    int64_t at = 0;
    b->in1 = take_rows(base, &at, tokens, s->d, s->spec[ZQ_LKD_QKV].act);
    b->in2 = take_rows(base, &at, tokens, b->q, s->spec[ZQ_LKD_O].act);
    b->in3 = take_rows(base, &at, tokens, s->d, s->spec[ZQ_LKD_UP].act);
    b->in4 = take_rows(base, &at, tokens, s->ff, s->spec[ZQ_LKD_DOWN].act);
    b->qk_in = take_floats(base, &at, s->qk_norm ? tokens * (b->q + b->kv) : 0);
    b->qkv_out = take_floats(base, &at, tokens * b->qkv);
    b->dqkv = take_floats(base, &at, tokens * b->qkv);
    b->gate = take_floats(base, &at, s->gated ? tokens * s->ff : 0);
    b->up = take_floats(base, &at, tokens * s->ff);
    b->wide = take_floats(base, &at, tokens * zq_max(s->ff, b->q));
    b->sum1 = take_floats(base, &at, d);
    b->h = take_floats(base, &at, post ? d : 0);
    b->sum2 = take_floats(base, &at, post ? d : 0);
    b->dy = take_floats(base, &at, d);
    b->dh = take_floats(base, &at, d);
    b->dn = take_floats(base, &at, d);
    b->ld_dyt = zq_row_pitch(tokens * 4) / 4;
    b->dyt = take_floats(base, &at, widest * b->ld_dyt);
    b->panels = take_floats(base, &at, panel_floats(b, tokens));
    b->partial = take_floats(base, &at, chunks * 2 * normed);
    b->chunk_loss = take(base, &at, 2 * chunks, sizeof *b->chunk_loss);
    b->position = take(base, &at, tokens, sizeof *b->position);
    b->zeros = take_floats(base, &at, zq_round_up(zq_max(widest, b->q), ZQ_NR));
    return at;
}

static zq_status
reserve(zq_lkd *b, int64_t tokens)
{
    if (tokens <= b->capacity) {
        return ZQ_OK;
    }
    zq_free(b->memory);
    b->capacity = b->bytes = 0;
    const int64_t bytes = lay_out(b, NULL, tokens);
    b->memory = zq_alloc((size_t)bytes);
    if (!b->memory) {
        return ZQ_ENOMEM;
    }
    b->bytes = lay_out(b, b->memory, tokens);
    memset(b->zeros, 0, (size_t)(b->bytes - ((char *)b->zeros - (char *)b->memory)));
    b->capacity = tokens;
    return ZQ_OK;
}

/* ---- forward ---------------------------------------------------------------------------------------- */

static int64_t
tokens_of(const zq_lkd_batch *batch)
{
    return batch->offsets[batch->sequences];
}

/* Where a row operator's results go: codes, or float32; y beside the codes where it is wanted. */
static zq_rows_out
into(const lkd_rows *r, zq_quant quant, float *y)
{
    return (zq_rows_out){.y = r->f ? r->f : y, .quant = quant, .q = r->q, .ld_q = r->ld_q, .q_scale = r->scale,
                         .q_zero = r->zero};
}

static zq_status
norm(zq_lkd *b, int tensor, const float *x, int64_t tokens, const zq_rows_out *out, int64_t *bad_row)
{
    const float *gamma = values_of(b, ZQ_LKD_VALUE, tensor);
    if (b->s.rms) {
        return zq_rmsnorm(x, NULL, gamma, tokens, b->s.d, b->s.eps, out, bad_row);
    }
    const float *beta = values_of(b, ZQ_LKD_VALUE, tensor + 1);
    return zq_layernorm(x, NULL, gamma, beta, tokens, b->s.d, b->s.eps, out, bad_row);
}

/* Float32 rows as a layer reads them. */
static zq_status
quantize(const float *x, int64_t tokens, int64_t k, zq_quant quant, const lkd_rows *out, int64_t *bad_row)
{
    if (quant == ZQ_QUANT_NONE) {
        if (x != out->f) {
            memcpy(out->f, x, (size_t)(tokens * k) * sizeof *x);
        }
        return ZQ_OK;
    }
    return zq_quantize_tokens(x, tokens, k, k, quant, out->q, out->ld_q, out->scale, out->zero, bad_row);
}

static void
set_positions(zq_lkd *b, const zq_lkd_batch *batch)
{
    for (int64_t s = 0; s < batch->sequences; s++) {
        for (int64_t r = batch->offsets[s]; r < batch->offsets[s + 1]; r++) {
            b->position[r] = (int32_t)(r - batch->offsets[s]);
        }
    }
}

static zq_status
prepare_linears(zq_lkd *b, zq_lkd_fault *fault, int64_t *bad_row)
{
    *fault = ZQ_LKD_IN_WEIGHT;
    for (int i = 0; i < ZQ_LKD_LINEARS; i++) {
        if (b->linear[i].n) {
            TRY(lkd_linear_prepare(b, &b->linear[i], bad_row));
        }
    }
    *fault = ZQ_LKD_IN_RESULT;
    return ZQ_OK;
}

/* sum1 = x + attention(x or its norm) */
static zq_status
attention_half(zq_lkd *b, const zq_lkd_batch *batch, int64_t *bad_row)
{
    const int64_t tokens = tokens_of(batch);
    const zq_quant quant = b->s.spec[ZQ_LKD_QKV].act, quant_o = b->s.spec[ZQ_LKD_O].act;
    if (b->s.order == ZQ_LKD_POST) {
        TRY(quantize(batch->x, tokens, b->s.d, quant, &b->in1, bad_row));
    }
    else {
        const zq_rows_out out = into(&b->in1, quant, NULL);
        TRY(norm(b, ZQ_LKD_NORM1, batch->x, tokens, &out, bad_row));
    }
    TRY(lkd_linear_forward(b, &b->linear[ZQ_LKD_QKV], &b->in1, tokens, NULL, b->qkv_out));
    TRY(lkd_heads(b, tokens, bad_row));
    float *const out = b->in2.f ? b->in2.f : b->wide;
    TRY(lkd_attention(b, batch, out, bad_row));
    TRY(quantize(out, tokens, b->q, quant_o, &b->in2, bad_row));
    return lkd_linear_forward(b, &b->linear[ZQ_LKD_O], &b->in2, tokens, batch->x, b->sum1);
}

/* in3: what the first layers of the feed-forward network read. */
static zq_status
inner_rows(zq_lkd *b, const zq_lkd_batch *batch, int64_t *bad_row)
{
    const int64_t tokens = tokens_of(batch);
    const zq_quant quant = b->s.spec[ZQ_LKD_UP].act;
    if (b->s.order != ZQ_LKD_POST) {
        const zq_rows_out out = into(&b->in3, quant, NULL);
        return norm(b, ZQ_LKD_NORM2, b->s.order == ZQ_LKD_PARALLEL ? batch->x : b->sum1, tokens, &out, bad_row);
    }
    const zq_rows_out out = into(&(lkd_rows){0}, ZQ_QUANT_NONE, b->h);
    TRY(norm(b, ZQ_LKD_NORM1, b->sum1, tokens, &out, bad_row));
    return quantize(b->h, tokens, b->s.d, quant, &b->in3, bad_row);
}

/* y = h + ffn(in3), through norm2 in post order */
static zq_status
ffn_half(zq_lkd *b, int64_t tokens, float *y, int64_t *bad_row)
{
    const int post = b->s.order == ZQ_LKD_POST;
    TRY(lkd_linear_forward(b, &b->linear[ZQ_LKD_UP], &b->in3, tokens, NULL, b->up));
    const zq_rows_out out = into(&b->in4, b->s.spec[ZQ_LKD_DOWN].act, NULL);
    if (b->s.gated) {
        TRY(lkd_linear_forward(b, &b->linear[ZQ_LKD_GATE], &b->in3, tokens, NULL, b->gate));
        TRY(zq_gated(b->gate, b->up, tokens, b->s.ff, b->s.act, &out, bad_row));
    }
    else {
        TRY(zq_activate(b->up, tokens, b->s.ff, b->s.act, &out, bad_row));
    }
    if (!post) {
        return lkd_linear_forward(b, &b->linear[ZQ_LKD_DOWN], &b->in4, tokens, b->sum1, y);
    }
    TRY(lkd_linear_forward(b, &b->linear[ZQ_LKD_DOWN], &b->in4, tokens, b->h, b->sum2));
    const zq_rows_out last = into(&(lkd_rows){0}, ZQ_QUANT_NONE, y);
    return norm(b, ZQ_LKD_NORM2, b->sum2, tokens, &last, bad_row);
}

/* As zq_lkd_forward, but y itself may hold NaN or Inf. */
static zq_status
forward(zq_lkd *b, const zq_lkd_batch *batch, float *y, zq_lkd_fault *fault, int64_t *bad_row)
{
    *fault = ZQ_LKD_IN_RESULT;
    b->stop = batch->stop;
    TRY(reserve(b, tokens_of(batch)));
    TRY(prepare_linears(b, fault, bad_row));
    set_positions(b, batch);
    TRY(attention_half(b, batch, bad_row));
    TRY(inner_rows(b, batch, bad_row));
    return ffn_half(b, tokens_of(batch), y, bad_row);
}

static zq_status
check_finite(const float *x, int64_t n)
{
    return zq_active()->absmax_f32(x, n) <= FLT_MAX ? ZQ_OK : ZQ_ENONFINITE;
}

zq_status
zq_lkd_forward(zq_lkd *b, const zq_lkd_batch *batch, float *y, zq_lkd_fault *fault, int64_t *bad_row)
{
    TRY(forward(b, batch, y, fault, bad_row));
    return check_finite(y, tokens_of(batch) * b->s.d);
}

/* ---- backward --------------------------------------------------------------------------------------- */

/* From d, the gradient of what down adds to: dx (tokens, d) = the gradient of in3 + residual. */
static zq_status
ffn_back(zq_lkd *b, int64_t tokens, const float *d, const float *residual, float *dx)
{
    const lkd_linear *l = b->linear;
    TRY(lkd_linear_dw(b, &l[ZQ_LKD_DOWN], d, &b->in4, tokens));
    TRY(lkd_linear_dx(b, &l[ZQ_LKD_DOWN], d, tokens, NULL, b->wide));
    lkd_activation_grad(b, tokens);
    TRY(lkd_linear_dw(b, &l[ZQ_LKD_UP], b->up, &b->in3, tokens));
    if (!b->s.gated) {
        return lkd_linear_dx(b, &l[ZQ_LKD_UP], b->up, tokens, residual, dx);
    }
    TRY(lkd_linear_dw(b, &l[ZQ_LKD_GATE], b->gate, &b->in3, tokens));
    TRY(lkd_linear_dx(b, &l[ZQ_LKD_GATE], b->gate, tokens, residual, b->dyt)); /* free between two dw */
    return lkd_linear_dx(b, &l[ZQ_LKD_UP], b->up, tokens, b->dyt, dx);
}

/* From d, the gradient of what o adds to: dx (tokens, d) = the gradient of in1 + residual, unless dx is NULL. */
static zq_status
attention_back(zq_lkd *b, const zq_lkd_batch *batch, const float *d, const float *residual, float *dx, int64_t *bad_row)
{
    const int64_t tokens = tokens_of(batch);
    const lkd_linear *l = b->linear;
    TRY(lkd_linear_dw(b, &l[ZQ_LKD_O], d, &b->in2, tokens));
    TRY(lkd_linear_dx(b, &l[ZQ_LKD_O], d, tokens, NULL, b->wide));
    TRY(lkd_attention_grad(b, batch, b->wide, bad_row));
    lkd_heads_grad(b, tokens);
    TRY(lkd_linear_dw(b, &l[ZQ_LKD_QKV], b->dqkv, &b->in1, tokens));
    return dx ? lkd_linear_dx(b, &l[ZQ_LKD_QKV], b->dqkv, tokens, residual, dx) : ZQ_OK;
}

static zq_status
back_post(zq_lkd *b, const zq_lkd_batch *batch, const float *dy, float *dx, int64_t *bad_row)
{
    const int64_t tokens = tokens_of(batch);
    lkd_norm_grad(b, ZQ_LKD_NORM2, b->sum2, dy, tokens, NULL, b->dh);
    TRY(ffn_back(b, tokens, b->dh, b->dh, b->dn));
    lkd_norm_grad(b, ZQ_LKD_NORM1, b->sum1, b->dn, tokens, NULL, b->dh);
    return attention_back(b, batch, b->dh, b->dh, dx, bad_row);
}

/* pre and parallel: what flows past the feed-forward network goes to dh; attention sees it in pre order only. */
static zq_status
back_pre(zq_lkd *b, const zq_lkd_batch *batch, const float *dy, float *dx, int64_t *bad_row)
{
    const int64_t tokens = tokens_of(batch);
    const int parallel = b->s.order == ZQ_LKD_PARALLEL;
    TRY(ffn_back(b, tokens, dy, NULL, b->dn));
    lkd_norm_grad(b, ZQ_LKD_NORM2, parallel ? batch->x : b->sum1, b->dn, tokens, dy, b->dh);
    TRY(attention_back(b, batch, parallel ? dy : b->dh, NULL, b->dn, bad_row));
    lkd_norm_grad(b, ZQ_LKD_NORM1, batch->x, b->dn, tokens, b->dh, dx ? dx : b->dn);
    return ZQ_OK;
}

static zq_status
back(zq_lkd *b, const zq_lkd_batch *batch, const float *dy, float *dx, int64_t *bad_row)
{
    return b->s.order == ZQ_LKD_POST ? back_post(b, batch, dy, dx, bad_row) : back_pre(b, batch, dy, dx, bad_row);
}

zq_status
zq_lkd_gradients(zq_lkd *b, const zq_lkd_batch *batch, const float *dy, float *dx, zq_lkd_fault *fault, int64_t *bad_row)
{
    *fault = ZQ_LKD_IN_RESULT;
    TRY(reserve(b, tokens_of(batch)));
    TRY(forward(b, batch, b->dy, fault, bad_row));
    TRY(back(b, batch, dy, dx, bad_row));
    TRY(dx ? check_finite(dx, tokens_of(batch) * b->s.d) : ZQ_OK);
    return check_finite(b->values[ZQ_LKD_GRADIENT], b->count);
}

zq_status
zq_lkd_step(zq_lkd *b, const zq_lkd_batch *batch, const float *target, const zq_lkd_options *o, double *loss,
            zq_lkd_fault *fault, int64_t *bad_row)
{
    *fault = ZQ_LKD_IN_RESULT;
    TRY(reserve(b, tokens_of(batch)));
    TRY(forward(b, batch, b->dy, fault, bad_row));
    *loss = lkd_loss(b, b->dy, target, tokens_of(batch), o->kl);
    if (!isfinite(*loss)) {
        return ZQ_ENONFINITE;
    }
    TRY(back(b, batch, b->dy, NULL, bad_row));
    TRY(check_finite(b->values[ZQ_LKD_GRADIENT], b->count));
    if (zq_stopped(b->stop)) {
        return ZQ_ESTOPPED;
    }
    lkd_adamw(b, o); /* as a whole or not at all: half a step is none that could be repeated */
    return ZQ_OK;
}
