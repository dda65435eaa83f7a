/* LayerNorm, RMSNorm, activations, gates and softmax over rows: threads, and quantization of each row while it is in
 * L1. The kernels do some rows at once. */
#include "bad_row.h"
#include "row_jobs.h"
#include "zq_kernels.h"

#include <stdatomic.h>
#include <string.h>

/* Elements of one job: some microseconds of work. */
enum { JOB_ITEMS = 32768 };

/* Elements of the rows that a kernel gets at once: with a residual and the output they still fit into L1. Two rows may be
 * longer: one alone hides no latency, which costs more. Softmax goes over them row by row and takes as many as a job has. */
enum { BATCH_ITEMS = 3072, PAIR_ITEMS = 4096 };

/* Floats of a cache line, and rows of a thread from which on gamma and beta are worth a copy that begins with a line. */
enum { LINE_ITEMS = 16, COPY_ROWS = 4 };

typedef struct row_jobs row_jobs;

/* One of each per column; NULL where the operator has none. */
typedef struct {
    const float *gamma, *beta;
} affine;

/* y = the operator's rows, `rows` <= ZQ_ROWS of them from `row` on, and their ranges unless that is NULL. Returns a bit for
 * each row, 1 where it is bad. */
typedef unsigned (*rows_fn)(const row_jobs *j, const affine *a, int64_t row, int64_t rows, float *y, zq_range *range);

struct row_jobs {
    rows_fn fn;
    const zq_kernels *K;
    const float *x, *other; /* other: residual or up */
    affine given;
    uint64_t copies; /* not 0: each thread copies `given` for this call, whose number this is */
    float eps;
    zq_activation act;
    int64_t m, n, batch_items, batch, jobs;
    const zq_rows_out *out;
    zq_trouble trouble;
};

/* Rows into codes, their slack zeroed: consumers read past n in whole vectors. The scales first, side by side: each is a chain
 * of divisions. */
static void
quantize_rows(const row_jobs *j, int64_t row, int64_t rows, const float *y, const zq_range *range, unsigned bad)
{
    const zq_rows_out *o = j->out;
    float inv[ZQ_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        const zq_range in = bad >> r & 1u ? (zq_range){0.0f, 0.0f} : range[r];
        inv[r] = zq_token_scale(o->quant, in.lo, in.hi, o->q_scale + row + r, o->q_zero + row + r);
    }
    for (int64_t r = 0; r < rows; r++) {
        uint8_t *q = o->q + (row + r) * o->ld_q;
        if (!(bad >> r & 1u)) {
            j->K->quantize_mul_f32_b8(y + r * j->n, j->n, inv[r], o->q_zero[row + r], q);
        }
        if (o->ld_q > j->n) {
            memset(q + j->n, 0, (size_t)(o->ld_q - j->n));
        }
    }
}

/* gamma and beta at the start of a cache line, by a copy for all rows of a thread: nearly every vector that is read elsewhere
 * lies across two lines and costs twice. Each thread has its own: lines that another core has just written come slower than
 * they are copied. Few rows do not pay for it. */
static int
worth_a_copy(const row_jobs *j)
{
    const uintptr_t both = (uintptr_t)j->given.gamma | (uintptr_t)j->given.beta;
    return both % (LINE_ITEMS * sizeof(float)) != 0 && j->m >= COPY_ROWS * zq_min(j->jobs, zq_threads());
}

/* What this thread's jobs of the call read: its copy, which its first job makes. Without memory the caller's will do. */
static affine
affine_of_thread(const row_jobs *j)
{
    static _Thread_local uint64_t copied;
    const int64_t stride = zq_round_up(j->n, LINE_ITEMS);
    float *copy = j->copies ? zq_scratch(ZQ_SCRATCH_ROW, (size_t)(2 * stride) * sizeof *copy) : NULL;
    if (!copy) {
        return j->given;
    }
    const affine own = {j->given.gamma ? copy : NULL, j->given.beta ? copy + stride : NULL};
    if (copied != j->copies) {
        const size_t bytes = (size_t)j->n * sizeof *copy;
        memcpy(copy, j->given.gamma, bytes);
        if (own.beta) {
            memcpy(copy + stride, j->given.beta, bytes);
        }
        copied = j->copies;
    }
    return own;
}

static void
row_job(void *ctx, int64_t job)
{
    row_jobs *j = ctx;
    float *scratch = NULL;
    if (!j->out->y && !(scratch = zq_scratch(ZQ_SCRATCH_NN, (size_t)(j->batch * j->n) * sizeof *scratch))) {
        atomic_store(&j->trouble.no_memory, 1);
        return;
    }
    const int64_t end = zq_first_row(j->m, job + 1, j->jobs);
    const int quant = j->out->quant != ZQ_QUANT_NONE;
    const affine own = affine_of_thread(j);
    for (int64_t row = zq_first_row(j->m, job, j->jobs), rows; row < end; row += rows) {
        zq_range range[ZQ_ROWS];
        rows = zq_ceil_div(end - row, zq_ceil_div(end - row, j->batch)); /* no batch is much smaller than the others */
        float *y = scratch ? scratch : j->out->y + row * j->n;
        const unsigned bad = j->fn(j, &own, row, rows, y, quant ? range : NULL);
        if (bad) {
            zq_note_bad_row(&j->trouble, row + __builtin_ctz(bad));
        }
        if (quant) {
            quantize_rows(j, row, rows, y, range, bad);
        }
    }
}

/* Rows of nothing: the scale and zero point of an all-zero row. */
static zq_status
run_empty(const row_jobs *j)
{
    const zq_range nothing = {0.0f, 0.0f};
    for (int64_t row = 0; j->out->quant != ZQ_QUANT_NONE && row < j->m; row++) {
        quantize_rows(j, row, 1, j->x, &nothing, 0);
    }
    return ZQ_OK;
}

static zq_status
run(row_jobs *j, int64_t *bad_row)
{
    static _Atomic(uint64_t) calls;
    j->K = zq_active();
    if (j->n == 0) {
        return run_empty(j);
    }
    j->batch = zq_max(2 * j->n <= PAIR_ITEMS ? 2 : 1, zq_min(ZQ_ROWS, j->batch_items / j->n));
    j->jobs = zq_row_jobs(j->m, j->n, JOB_ITEMS);
    j->copies = worth_a_copy(j) ? 1 + atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed) : 0;
    zq_trouble_init(&j->trouble);
    zq_parallel_for(j->jobs, row_job, j);
    return zq_trouble_status(&j->trouble, bad_row);
}

/* The rows from `row` on of an operand that may be missing. */
static const float *
from_row(const float *x, int64_t row, int64_t n)
{
    return x ? x + row * n : NULL;
}

static unsigned
layernorm_rows(const row_jobs *j, const affine *a, int64_t row, int64_t rows, float *y, zq_range *range)
{
    return j->K->layernorm_rows_f32(j->x + row * j->n, from_row(j->other, row, j->n), a->gamma, a->beta, rows, j->n, j->eps, y,
                                    range);
}

zq_status
zq_layernorm(const float *x, const float *residual, const float *gamma, const float *beta, int64_t m, int64_t n, float eps,
             const zq_rows_out *out, int64_t *bad_row)
{
    row_jobs j = {.fn = layernorm_rows, .batch_items = BATCH_ITEMS, .x = x, .other = residual, .given = {gamma, beta},
                  .eps = eps};
    j.m = m, j.n = n, j.out = out;
    return run(&j, bad_row);
}

static unsigned
rmsnorm_rows(const row_jobs *j, const affine *a, int64_t row, int64_t rows, float *y, zq_range *range)
{
    return j->K->rmsnorm_rows_f32(j->x + row * j->n, from_row(j->other, row, j->n), a->gamma, rows, j->n, j->eps, y, range);
}

zq_status
zq_rmsnorm(const float *x, const float *residual, const float *gamma, int64_t m, int64_t n, float eps, const zq_rows_out *out,
           int64_t *bad_row)
{
    row_jobs j = {.fn = rmsnorm_rows, .batch_items = BATCH_ITEMS, .x = x, .other = residual, .given = {gamma, NULL}, .eps = eps};
    j.m = m, j.n = n, j.out = out;
    return run(&j, bad_row);
}

static unsigned
activation_rows(const row_jobs *j, const affine *a, int64_t row, int64_t rows, float *y, zq_range *range)
{
    (void)a;
    return j->K->activation_rows_f32(j->x + row * j->n, from_row(j->other, row, j->n), rows, j->n, j->act, y, range);
}

zq_status
zq_activate(const float *x, int64_t m, int64_t n, zq_activation act, const zq_rows_out *out, int64_t *bad_row)
{
    row_jobs j = {.fn = activation_rows, .batch_items = BATCH_ITEMS, .x = x, .act = act, .m = m, .n = n, .out = out};
    return run(&j, bad_row);
}

zq_status
zq_gated(const float *gate, const float *up, int64_t m, int64_t n, zq_activation act, const zq_rows_out *out,
         int64_t *bad_row)
{
    row_jobs j = {.fn = activation_rows, .batch_items = BATCH_ITEMS, .x = gate, .other = up, .act = act, .m = m, .n = n,
                  .out = out};
    return run(&j, bad_row);
}

static unsigned
softmax_rows(const row_jobs *j, const affine *a, int64_t row, int64_t rows, float *y, zq_range *range)
{
    (void)a;
    (void)range; /* codes have a job of their own */
    return j->K->softmax_rows_f32(j->x + row * j->n, rows, j->n, y);
}

/* Up to ZQ_ROWS rows as codes, whose scales follow from the sums: the largest result is exp(0) / sum. */
static void
softmax_codes(row_jobs *j, int64_t row, int64_t rows)
{
    const zq_rows_out *o = j->out;
    const int asym = o->quant == ZQ_QUANT_TOKEN_ASYM;
    uint8_t *q = o->q + row * o->ld_q;
    float factor[ZQ_ROWS];
    const unsigned bad =
        j->K->softmax_rows_f32_b8(j->x + row * j->n, rows, j->n, asym ? 255 : 127, asym ? 0 : 128, q, o->ld_q, factor);
    if (bad) {
        zq_note_bad_row(&j->trouble, row + __builtin_ctz(bad));
    }
    for (int64_t r = 0; r < rows; r++) {
        zq_token_scale(o->quant, 0.0f, bad >> r & 1u ? 0.0f : factor[r], o->q_scale + row + r, o->q_zero + row + r);
        memset(q + r * o->ld_q + j->n, 0, (size_t)(o->ld_q - j->n));
    }
}

static void
softmax_code_job(void *ctx, int64_t job)
{
    row_jobs *j = ctx;
    const int64_t end = zq_first_row(j->m, job + 1, j->jobs);
    for (int64_t row = zq_first_row(j->m, job, j->jobs), rows; row < end; row += rows) {
        rows = zq_min(end - row, ZQ_ROWS);
        softmax_codes(j, row, rows);
    }
}

zq_status
zq_softmax(const float *x, int64_t m, int64_t n, const zq_rows_out *out, int64_t *bad_row)
{
    row_jobs j = {.fn = softmax_rows, .batch_items = JOB_ITEMS, .x = x, .m = m, .n = n, .out = out};
    if (out->quant == ZQ_QUANT_NONE || n == 0) {
        return run(&j, bad_row);
    }
    j.K = zq_active();
    j.jobs = zq_row_jobs(m, n, JOB_ITEMS);
    zq_trouble_init(&j.trouble);
    zq_parallel_for(j.jobs, softmax_code_job, &j);
    return zq_trouble_status(&j.trouble, bad_row);
}
