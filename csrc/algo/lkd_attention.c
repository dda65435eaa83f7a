/* Attention of a block in training, and its backward, per sequence and key head, by tiles of query rows against all keys
 * that they see:
 *     p = softmax(scale q k^T)    o = p v
 *     dv = p^T do    dp = do v^T    ds = p (dp - sum p dp)    dq = scale ds k    dk = ds^T (scale q)
 * p is computed again on the way back rather than kept. A job owns a key head, so that dk and dv add up in one order: over the
 * query heads that share it, then over the rows. Its memory is its own, as what is asked between tiles whether to stop may use
 * the thread's. */
#include "lkd_block.h"

#include <math.h>
#include <string.h>

enum { TILE_ROWS = 48 }; /* a tile of scores of 128 keys fits into L1; does not change the result */

typedef struct {
    zq_lkd *b;
    const zq_kernels *K;
    const zq_lkd_batch *batch;
    float *out;        /* forward */
    const float *dout; /* backward */
    zq_trouble trouble;
} attention;

/* One job's sequence and memory. Rows are dp = head_dim rounded up to 16 floats; keys are filled up with zeros to lp. */
typedef struct {
    attention *t;
    int64_t row, length, kv_head; /* first row of the sequence, its rows */
    int64_t d, dp, lp;
    float *q, *k, *v, *kt, *vt;   /* q: scaled. kt, vt: (d, lp) */
    float *s, *o;                 /* a tile: scores (rows, keys); (rows, dp) */
    float *dout, *dk, *dv, *ds, *st; /* backward; st: (keys, rows) */
} job_memory;

static float *
take(float **at, int64_t items)
{
    float *p = *at;
    *at += zq_round_up(items, 16);
    return p;
}

/* Returns memory to be freed, or NULL where there is none. */
static void *
lay_out(job_memory *w, int backward)
{
    const int64_t rows = w->lp * w->dp, turned = w->d * w->lp, tile = TILE_ROWS * w->lp, outputs = TILE_ROWS * w->dp;
    const int64_t floats = 3 * rows + turned + tile + outputs + (backward ? 3 * rows + turned + 2 * tile : 0) + 16 * 12;
    float *const memory = zq_alloc((size_t)floats * sizeof *memory), *at = memory;
    if (!memory) {
        return NULL;
    }
    w->q = take(&at, rows);
    w->k = take(&at, rows);
    w->v = take(&at, rows);
    w->kt = take(&at, turned);
    w->s = take(&at, tile);
    w->o = take(&at, outputs);
    if (backward) {
        w->vt = take(&at, turned);
        w->dout = take(&at, rows);
        w->dk = take(&at, rows);
        w->dv = take(&at, rows);
        w->ds = take(&at, tile);
        w->st = take(&at, tile);
    }
    return memory;
}

/* (length, d) of x, ld apart, into rows of dp; rows and columns that fill up are zeros. */
static void
load_rows(const job_memory *w, const float *x, int64_t ld, float *out)
{
    w->t->K->copy_rows_f32(x, w->length, w->d, ld, out, w->dp);
    memset(out + w->length * w->dp, 0, (size_t)((w->lp - w->length) * w->dp) * sizeof *out);
}

/* (lp, dp) transposed to (d, lp) */
static void
turn(const job_memory *w, const float *x, float *out)
{
    w->t->K->transpose_f32(x, w->lp, w->d, w->dp, out, w->lp);
}

static const float *
qkv_at(const job_memory *w, const float *qkv, int64_t column)
{
    return qkv + w->row * w->t->b->qkv + column;
}

static void
load_keys(job_memory *w)
{
    const zq_lkd *b = w->t->b;
    const int64_t head = w->kv_head * w->d;
    load_rows(w, qkv_at(w, b->qkv_out, b->q + head), b->qkv, w->k);
    load_rows(w, qkv_at(w, b->qkv_out, b->q + b->kv + head), b->qkv, w->v);
    turn(w, w->k, w->kt);
}

/* The queries of a head, times the scale. */
static void
load_queries(job_memory *w, int64_t head)
{
    const zq_lkd *b = w->t->b;
    load_rows(w, qkv_at(w, b->qkv_out, head * w->d), b->qkv, w->q);
    w->t->K->scale_f32(w->q, w->length * w->dp, b->s.scale, w->q);
}

/* y (m, n) = a (m, k) b (k, n) [+ y] */
static void
multiply(const job_memory *w, const float *a, int64_t lda, int64_t m, int64_t k, const float *b, int64_t ldb, int64_t n,
         float *y, int64_t ldy, int accumulate)
{
    const zq_kernels *K = w->t->K;
    for (int64_t i = 0; i < m; i += K->mr_matmul) {
        const zq_tile t = {.mr = (int)zq_min(K->mr_matmul, m - i), .nr = (int)n, .k = k, .a = a + i * lda, .lda = lda, .b = b,
                           .y = y + i * ldy, .ldy = ldy};
        K->matmul_f32(&t, ldb, ZQ_NR, accumulate);
    }
}

/* Query rows r0 .. r0 + rows - 1 against the first n keys: what they do not see becomes -Inf. */
static void
hide(const job_memory *w, int64_t r0, int64_t rows, int64_t n)
{
    const zq_lkd_shape *s = &w->t->b->s;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t end = s->causal ? r0 + i + 1 : w->length, begin = s->window ? zq_max(0, r0 + i + 1 - s->window) : 0;
        float *row = w->s + i * n;
        for (int64_t j = 0; j < begin; j++) {
            row[j] = -INFINITY;
        }
        for (int64_t j = end; j < n; j++) {
            row[j] = -INFINITY;
        }
    }
}

/* The softmax weights of a tile of query rows; returns how many keys it goes over. */
static int64_t
weights(job_memory *w, int64_t r0, int64_t rows)
{
    attention *t = w->t;
    const int64_t n = t->b->s.causal ? zq_round_up(r0 + rows, 16) : w->lp;
    multiply(w, w->q + r0 * w->dp, w->dp, rows, w->d, w->kt, w->lp, n, w->s, n, 0);
    hide(w, r0, rows, n);
    for (int64_t i = 0; i < rows; i += ZQ_ROWS) {
        if (t->K->softmax_rows_f32(w->s + i * n, zq_min(ZQ_ROWS, rows - i), n, w->s + i * n)) {
            zq_note_bad_row(&t->trouble, w->row + r0);
        }
    }
    return n;
}

/* Rows of a tile to columns of a head, times a factor. */
static void
store_rows(const job_memory *w, const float *x, int64_t rows, float factor, float *out, int64_t ld)
{
    for (int64_t i = 0; i < rows; i++) {
        w->t->K->scale_f32(x + i * w->dp, w->d, factor, out + i * ld);
    }
}

static void
head_forward(job_memory *w, int64_t head)
{
    const int64_t ld = w->t->b->q;
    load_queries(w, head);
    for (int64_t r = 0; r < w->length && !zq_stopped(w->t->b->stop); r += TILE_ROWS) {
        const int64_t rows = zq_min(TILE_ROWS, w->length - r), n = weights(w, r, rows);
        multiply(w, w->s, n, rows, n, w->v, w->dp, w->dp, w->o, w->dp, 0);
        store_rows(w, w->o, rows, 1.0f, w->t->out + (w->row + r) * ld + head * w->d, ld);
    }
}

static void
head_backward(job_memory *w, int64_t head)
{
    const zq_kernels *K = w->t->K;
    const zq_lkd *b = w->t->b;
    load_queries(w, head);
    load_rows(w, w->t->dout + w->row * b->q + head * w->d, b->q, w->dout);
    for (int64_t r = 0; r < w->length && !zq_stopped(w->t->b->stop); r += TILE_ROWS) {
        const int64_t rows = zq_min(TILE_ROWS, w->length - r), n = weights(w, r, rows);
        const float *dout = w->dout + r * w->dp;
        multiply(w, dout, w->dp, rows, w->d, w->vt, w->lp, n, w->ds, n, 0);
        K->transpose_f32(w->s, rows, n, n, w->st, TILE_ROWS);
        multiply(w, w->st, TILE_ROWS, n, rows, dout, w->dp, w->dp, w->dv, w->dp, 1);
        for (int64_t i = 0; i < rows; i++) {
            K->softmax_grad_f32(w->s + i * n, n, w->ds + i * n);
        }
        multiply(w, w->ds, n, rows, n, w->k, w->dp, w->dp, w->o, w->dp, 0);
        store_rows(w, w->o, rows, b->s.scale, b->dqkv + (w->row + r) * b->qkv + head * w->d, b->qkv);
        K->transpose_f32(w->ds, rows, n, n, w->st, TILE_ROWS);
        multiply(w, w->st, TILE_ROWS, n, rows, w->q + r * w->dp, w->dp, w->dp, w->dk, w->dp, 1);
    }
}

static void
attention_job(void *ctx, int64_t job)
{
    attention *t = ctx;
    const zq_lkd *b = t->b;
    const int64_t sequence = job / b->s.kv_heads, share = b->s.heads / b->s.kv_heads, *offsets = t->batch->offsets;
    job_memory w = {.t = t, .kv_head = job % b->s.kv_heads, .row = offsets[sequence], .d = b->s.head_dim,
                    .dp = zq_round_up(b->s.head_dim, 16)};
    w.length = offsets[sequence + 1] - w.row;
    w.lp = zq_round_up(w.length, 16);
    if (w.length == 0) {
        return;
    }
    void *const memory = lay_out(&w, t->dout != NULL);
    if (!memory) {
        atomic_store(&t->trouble.no_memory, 1);
        return;
    }
    load_keys(&w);
    if (t->dout) {
        turn(&w, w.v, w.vt);
        memset(w.dk, 0, (size_t)(w.lp * w.dp) * sizeof *w.dk);
        memset(w.dv, 0, (size_t)(w.lp * w.dp) * sizeof *w.dv);
    }
    for (int64_t h = w.kv_head * share; h < (w.kv_head + 1) * share; h++) {
        if (t->dout) {
            head_backward(&w, h);
        }
        else {
            head_forward(&w, h);
        }
    }
    if (t->dout) {
        float *const dk = b->dqkv + w.row * b->qkv + b->q + w.kv_head * w.d;
        store_rows(&w, w.dk, w.length, 1.0f, dk, b->qkv);
        store_rows(&w, w.dv, w.length, 1.0f, dk + b->kv, b->qkv);
    }
    zq_free(memory);
}

static zq_status
run(attention *t, int64_t *bad_row)
{
    t->K = zq_active();
    zq_trouble_init(&t->trouble);
    const int stopped = zq_parallel_until(t->batch->sequences * t->b->s.kv_heads, attention_job, t, t->b->stop);
    return stopped ? ZQ_ESTOPPED : zq_trouble_status(&t->trouble, bad_row);
}

zq_status
lkd_attention(zq_lkd *b, const zq_lkd_batch *batch, float *out, int64_t *bad_row)
{
    return run(&(attention){.b = b, .batch = batch, .out = out}, bad_row);
}

zq_status
lkd_attention_grad(zq_lkd *b, const zq_lkd_batch *batch, const float *dout, int64_t *bad_row)
{
    return run(&(attention){.b = b, .batch = batch, .dout = dout}, bad_row);
}
