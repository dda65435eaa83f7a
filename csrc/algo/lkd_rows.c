/* Row operators of a block in training: gradients of norms and activations, norm and rotary embedding of the heads of q and k
 * with their gradients, the loss, AdamW. Sums over rows are those of chunks of LKD_CHUNK rows, added up in order. */
#include "lkd_block.h"

#include <math.h>
#include <string.h>

typedef struct {
    zq_lkd *b;
    const zq_kernels *K;
    int64_t tokens, n;
    const float *x, *dy, *gamma, *add, *target;
    float *dx;
    float factor, kl;
} row_jobs;

static int64_t
chunks(int64_t tokens)
{
    return zq_ceil_div(tokens, LKD_CHUNK);
}

static int64_t
chunk_end(int64_t tokens, int64_t job)
{
    return zq_min(tokens, (job + 1) * LKD_CHUNK);
}

/* ---- norms ------------------------------------------------------------------------------------------ */

static void
norm_job(void *ctx, int64_t job)
{
    const row_jobs *j = ctx;
    float *sums = j->b->partial + job * 2 * j->n;
    memset(sums, 0, (size_t)(2 * j->n) * sizeof *sums);
    zq_norm_grad g = {.gamma = j->gamma, .n = j->n, .eps = j->b->s.eps, .centred = !j->b->s.rms, .dgamma = sums,
                      .dbeta = sums + j->n};
    for (int64_t r = job * LKD_CHUNK; r < chunk_end(j->tokens, job); r++) {
        g.x = j->x + r * j->n;
        g.dy = j->dy + r * j->n;
        g.add = j->add ? j->add + r * j->n : NULL;
        g.dx = j->dx + r * j->n;
        j->K->norm_grad_f32(&g);
    }
}

/* first and second (n), unless NULL, = the sums over all chunks of partial (chunks, 2, n) */
static void
add_chunks(const zq_lkd *b, int64_t tokens, int64_t n, float *first, float *second)
{
    float *const sums[2] = {first, second};
    for (int i = 0; i < 2 && sums[i]; i++) {
        memset(sums[i], 0, (size_t)n * sizeof **sums);
        for (int64_t c = 0; c < chunks(tokens); c++) {
            const float *const part = b->partial + (2 * c + i) * n;
            for (int64_t j = 0; j < n; j++) {
                sums[i][j] += part[j];
            }
        }
    }
}

void
lkd_norm_grad(zq_lkd *b, int tensor, const float *x, const float *dy, int64_t tokens, const float *add, float *dx)
{
    const int64_t d = b->s.d;
    float *const dgamma = b->values[ZQ_LKD_GRADIENT] + b->first[tensor];
    float *const dbeta = b->s.rms ? NULL : b->values[ZQ_LKD_GRADIENT] + b->first[tensor + 1];
    row_jobs j = {.b = b, .K = zq_active(), .tokens = tokens, .n = d, .x = x, .dy = dy, .add = add, .dx = dx};
    j.gamma = b->values[ZQ_LKD_VALUE] + b->first[tensor];
    zq_parallel_for(chunks(tokens), norm_job, &j);
    add_chunks(b, tokens, d, dgamma, dbeta);
}

/* ---- the heads of q and k ---------------------------------------------------------------------------- */

typedef struct {
    zq_lkd *b;
    const zq_kernels *K;
    int64_t tokens;
    zq_trouble trouble;
} head_jobs;

/* The adjacent heads of q and k of a row turned by sin, or back by minus_sin. */
static void
rotate_row(const head_jobs *j, int64_t row, const float *sin, float *x)
{
    const zq_lkd_shape *s = &j->b->s;
    const int64_t at = j->b->position[row] * s->half;
    if (s->half) {
        j->K->rotary_f32(x, s->heads + s->kv_heads, s->head_dim, s->half, s->interleaved, j->b->cos + at, sin + at, x);
    }
}

/* 0 for the heads of q, 1 for those of k, which lie behind them: which of the two norms is theirs. */
static int
norm_of_head(const zq_lkd *b, int64_t head)
{
    return head >= b->s.heads;
}

static void
heads_job(void *ctx, int64_t job)
{
    head_jobs *j = ctx;
    const zq_lkd *b = j->b;
    const int64_t heads = b->s.heads + b->s.kv_heads, d = b->s.head_dim;
    for (int64_t r = job * LKD_CHUNK; r < chunk_end(j->tokens, job); r++) {
        float *const row = b->qkv_out + r * b->qkv;
        if (b->s.qk_norm) {
            float *const in = b->qk_in + r * heads * d;
            memcpy(in, row, (size_t)(heads * d) * sizeof *in);
            for (int64_t h = 0; h < heads; h++) {
                const float *const gamma = b->values[ZQ_LKD_VALUE] + b->first[ZQ_LKD_Q_NORM + norm_of_head(b, h)];
                if (!j->K->rmsnorm_f32(in + h * d, NULL, gamma, d, b->s.eps, row + h * d)) {
                    zq_note_bad_row(&j->trouble, r);
                }
            }
        }
        rotate_row(j, r, b->sin, row);
    }
}

zq_status
lkd_heads(zq_lkd *b, int64_t tokens, int64_t *bad_row)
{
    head_jobs j = {.b = b, .K = zq_active(), .tokens = tokens};
    zq_trouble_init(&j.trouble);
    zq_parallel_for(chunks(tokens), heads_job, &j);
    return zq_trouble_status(&j.trouble, bad_row);
}

/* Sums of a chunk: the gradients of the gains of q, and behind them of k. */
static void
heads_grad_job(void *ctx, int64_t job)
{
    const head_jobs *j = ctx;
    const zq_lkd *b = j->b;
    const int64_t heads = b->s.heads + b->s.kv_heads, d = b->s.head_dim;
    float *const sums = b->partial + job * 2 * d;
    if (b->s.qk_norm) {
        memset(sums, 0, (size_t)(2 * d) * sizeof *sums);
    }
    for (int64_t r = job * LKD_CHUNK; r < chunk_end(j->tokens, job); r++) {
        float *const row = b->dqkv + r * b->qkv;
        rotate_row(j, r, b->minus_sin, row);
        for (int64_t h = 0; b->s.qk_norm && h < heads; h++) {
            const int k = norm_of_head(b, h);
            float *const dx = row + h * d;
            const zq_norm_grad g = {.x = b->qk_in + (r * heads + h) * d, .dy = dx, .dx = dx, .n = d, .eps = b->s.eps,
                                    .gamma = b->values[ZQ_LKD_VALUE] + b->first[ZQ_LKD_Q_NORM + k], .dgamma = sums + k * d};
            j->K->norm_grad_f32(&g);
        }
    }
}

void
lkd_heads_grad(zq_lkd *b, int64_t tokens)
{
    zq_parallel_for(chunks(tokens), heads_grad_job, &(head_jobs){.b = b, .K = zq_active(), .tokens = tokens});
    if (b->s.qk_norm) {
        float *const gradients = b->values[ZQ_LKD_GRADIENT];
        add_chunks(b, tokens, b->s.head_dim, gradients + b->first[ZQ_LKD_Q_NORM], gradients + b->first[ZQ_LKD_K_NORM]);
    }
}

/* ---- activation ------------------------------------------------------------------------------------- */

static void
activation_job(void *ctx, int64_t job)
{
    const row_jobs *j = ctx;
    const zq_lkd *b = j->b;
    const int64_t at = job * LKD_CHUNK * j->n, n = (chunk_end(j->tokens, job) - job * LKD_CHUNK) * j->n;
    float *const up = b->up + at;
    if (b->s.gated) {
        j->K->activation_grad_f32(b->gate + at, up, b->wide + at, n, b->s.act, b->gate + at, up);
    }
    else {
        j->K->activation_grad_f32(up, NULL, b->wide + at, n, b->s.act, up, NULL);
    }
}

void
lkd_activation_grad(zq_lkd *b, int64_t tokens)
{
    row_jobs j = {.b = b, .K = zq_active(), .tokens = tokens, .n = b->s.ff};
    zq_parallel_for(chunks(tokens), activation_job, &j);
}

/* ---- loss ------------------------------------------------------------------------------------------- */

/* KL of the softmax p of the target row from that r of y: sum p (log p - log r), log p_j = t_j - max t + log max p. r, with p
 * behind it, becomes kl (r - p). */
static double
divergence_of(const row_jobs *j, const float *y, const float *target, float *r)
{
    const int64_t n = j->n;
    float *const p = r + n;
    const float top_t = j->K->max_f32(target, n), top_y = j->K->max_f32(y, n);
    j->K->softmax_rows_f32(target, 1, n, p);
    j->K->softmax_rows_f32(y, 1, n, r);
    double sum = (double)logf(j->K->max_f32(p, n)) - (double)logf(j->K->max_f32(r, n));
    for (int64_t i = 0; i < n; i++) {
        sum += (double)(p[i] * ((target[i] - top_t) - (y[i] - top_y)));
        r[i] = j->kl * (r[i] - p[i]);
    }
    return sum;
}

/* The two losses of rows, summed; their gradient in place of y. */
static void
loss_job(void *ctx, int64_t job)
{
    const row_jobs *j = ctx;
    const int64_t n = j->n;
    float *const more = j->kl != 0.0f ? zq_scratch(ZQ_SCRATCH_NN, (size_t)(2 * n) * sizeof *more) : NULL;
    double squares = j->kl != 0.0f && !more ? (double)NAN : 0.0, divergence = 0.0;
    for (int64_t r = job * LKD_CHUNK; r < chunk_end(j->tokens, job); r++) {
        float *const y = j->dx + r * n;
        const float *const target = j->target + r * n;
        divergence += more ? divergence_of(j, y, target, more) : 0.0;
        squares += (double)j->K->square_loss_f32(y, target, n, j->factor, y);
        for (int64_t i = 0; more && i < n; i++) {
            y[i] += more[i];
        }
    }
    j->b->chunk_loss[2 * job] = squares;
    j->b->chunk_loss[2 * job + 1] = divergence;
}

double
lkd_loss(zq_lkd *b, float *y, const float *target, int64_t tokens, double kl)
{
    const double items = (double)tokens * (double)b->s.d;
    row_jobs j = {.b = b, .K = zq_active(), .tokens = tokens, .n = b->s.d, .target = target, .dx = y};
    j.factor = (float)(2.0 / items);
    j.kl = (float)(kl / (double)tokens);
    zq_parallel_for(chunks(tokens), loss_job, &j);
    double squares = 0, divergence = 0;
    for (int64_t c = 0; c < chunks(tokens); c++) {
        squares += b->chunk_loss[2 * c];
        divergence += b->chunk_loss[2 * c + 1];
    }
    return squares / items + kl * divergence / (double)tokens;
}

/* ---- AdamW ------------------------------------------------------------------------------------------ */

enum { ADAM_ITEMS = 1 << 14 };

typedef struct {
    zq_lkd *b;
    const zq_kernels *K;
    zq_adamw weights, others; /* with and without decay */
} adam_jobs;

static void
adam_job(void *ctx, int64_t job)
{
    const adam_jobs *a = ctx;
    const zq_lkd *b = a->b;
    const int64_t from = job * ADAM_ITEMS, to = zq_min(b->count, from + ADAM_ITEMS);
    const int64_t cut = zq_max(from, zq_min(b->weights, to)), ends[2] = {cut, to};
    for (int64_t i = 0, at = from; i < 2; at = ends[i++]) {
        if (at < ends[i]) {
            a->K->adamw_f32(i ? &a->others : &a->weights, b->values[ZQ_LKD_GRADIENT] + at, ends[i] - at,
                            b->values[ZQ_LKD_VALUE] + at, b->values[ZQ_LKD_FIRST] + at, b->values[ZQ_LKD_SECOND] + at);
        }
    }
}

/* 1 - beta^steps */
static double
bias_correction(double beta, int64_t steps)
{
    double power = 1.0;
    for (; steps > 0; steps /= 2, beta *= beta) {
        power *= steps % 2 ? beta : 1.0;
    }
    return 1.0 - power;
}

void
lkd_adamw(zq_lkd *b, const zq_lkd_options *o)
{
    b->steps++;
    adam_jobs a = {.b = b, .K = zq_active()};
    a.others = (zq_adamw){.beta1 = (float)o->beta1, .beta2 = (float)o->beta2, .gain1 = (float)(1 - o->beta1),
                          .gain2 = (float)(1 - o->beta2), .keep = 1.0f, .eps = (float)o->eps};
    a.others.step = (float)(o->lr / bias_correction(o->beta1, b->steps));
    a.others.root = 1.0f / sqrtf((float)bias_correction(o->beta2, b->steps));
    a.weights = a.others;
    a.weights.keep = (float)(1 - o->lr * o->decay);
    zq_parallel_for(zq_ceil_div(b->count, ADAM_ITEMS), adam_job, &a);
}
