/* LayerNorm, RMSNorm, activations, gates and softmax over rows: threads, and quantization of each row while it is in
 * L1. The kernels do one row. */
#include "bad_row.h"
#include "zq_kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Elements of one job: some microseconds of work. */
enum { JOB_ITEMS = 16384 };

typedef struct row_jobs row_jobs;

/* y = the operator's row, and its range unless that is NULL; 0 where the input, or y where its range is asked for, is not
 * finite. */
typedef int (*row_fn)(const row_jobs *j, int64_t row, float *y, zq_range *range);

struct row_jobs {
    row_fn fn;
    const zq_kernels *K;
    const float *x, *other; /* other: residual or up */
    const float *gamma, *beta;
    float eps;
    zq_activation act;
    int64_t m, n, rows_per_job;
    const zq_rows_out *out;
    zq_trouble trouble;
};

/* One row into codes, its slack zeroed: consumers read past n in whole vectors. */
static void
quantize_row(const row_jobs *j, int64_t row, const float *y, const zq_range *range)
{
    const zq_rows_out *o = j->out;
    uint8_t *q = o->q + row * o->ld_q;
    if (o->ld_q > j->n) {
        memset(q + j->n, 0, (size_t)(o->ld_q - j->n));
    }
    zq_quantize_token_in(j->K, y, j->n, o->quant, range->lo, range->hi, q, o->q_scale + row, o->q_zero + row);
}

static void
row_job(void *ctx, int64_t job)
{
    row_jobs *j = ctx;
    float *scratch = NULL;
    if (!j->out->y && !(scratch = zq_scratch(ZQ_SCRATCH_NN, (size_t)j->n * sizeof *scratch))) {
        atomic_store(&j->trouble.no_memory, 1);
        return;
    }
    const int64_t end = zq_min(j->m, (job + 1) * j->rows_per_job);
    const int quant = j->out->quant != ZQ_QUANT_NONE;
    for (int64_t row = job * j->rows_per_job; row < end; row++) {
        float *y = scratch ? scratch : j->out->y + row * j->n;
        zq_range range;
        if (!j->fn(j, row, y, quant ? &range : NULL)) {
            zq_note_bad_row(&j->trouble, row);
        }
        else if (quant) {
            quantize_row(j, row, y, &range);
        }
    }
}

/* Rows of nothing: the scale and zero point of an all-zero row. */
static zq_status
run_empty(const row_jobs *j)
{
    const zq_range nothing = {0.0f, 0.0f};
    for (int64_t row = 0; j->out->quant != ZQ_QUANT_NONE && row < j->m; row++) {
        quantize_row(j, row, j->x, &nothing);
    }
    return ZQ_OK;
}

static zq_status
run(row_jobs *j, int64_t *bad_row)
{
    j->K = zq_active();
    if (j->n == 0) {
        return run_empty(j);
    }
    j->rows_per_job = zq_max(1, JOB_ITEMS / j->n);
    zq_trouble_init(&j->trouble);
    zq_parallel_for(zq_ceil_div(j->m, j->rows_per_job), row_job, j);
    return zq_trouble_status(&j->trouble, bad_row);
}

static int
layernorm_row(const row_jobs *j, int64_t row, float *y, zq_range *range)
{
    const float *residual = j->other ? j->other + row * j->n : NULL;
    const float *x = j->x + row * j->n;
    return range ? j->K->layernorm_range_f32(x, residual, j->gamma, j->beta, j->n, j->eps, y, range)
                 : j->K->layernorm_f32(x, residual, j->gamma, j->beta, j->n, j->eps, y);
}

zq_status
zq_layernorm(const float *x, const float *residual, const float *gamma, const float *beta, int64_t m, int64_t n, float eps,
             const zq_rows_out *out, int64_t *bad_row)
{
    row_jobs j = {.fn = layernorm_row, .x = x, .other = residual, .gamma = gamma, .beta = beta, .eps = eps};
    j.m = m, j.n = n, j.out = out;
    return run(&j, bad_row);
}

static int
rmsnorm_row(const row_jobs *j, int64_t row, float *y, zq_range *range)
{
    const float *residual = j->other ? j->other + row * j->n : NULL;
    const float *x = j->x + row * j->n;
    return range ? j->K->rmsnorm_range_f32(x, residual, j->gamma, j->n, j->eps, y, range)
                 : j->K->rmsnorm_f32(x, residual, j->gamma, j->n, j->eps, y);
}

zq_status
zq_rmsnorm(const float *x, const float *residual, const float *gamma, int64_t m, int64_t n, float eps, const zq_rows_out *out,
           int64_t *bad_row)
{
    row_jobs j = {.fn = rmsnorm_row, .x = x, .other = residual, .gamma = gamma, .eps = eps};
    j.m = m, j.n = n, j.out = out;
    return run(&j, bad_row);
}

static int
activation_row(const row_jobs *j, int64_t row, float *y, zq_range *range)
{
    const float *x = j->x + row * j->n;
    return range ? j->K->activation_range_f32(x, j->n, j->act, y, range) : j->K->activation_f32(x, j->n, j->act, y);
}

zq_status
zq_activate(const float *x, int64_t m, int64_t n, zq_activation act, const zq_rows_out *out, int64_t *bad_row)
{
    row_jobs j = {.fn = activation_row, .x = x, .act = act, .m = m, .n = n, .out = out};
    return run(&j, bad_row);
}

static int
gated_row(const row_jobs *j, int64_t row, float *y, zq_range *range)
{
    const float *gate = j->x + row * j->n, *up = j->other + row * j->n;
    return range ? j->K->gated_range_f32(gate, up, j->n, j->act, y, range) : j->K->gated_f32(gate, up, j->n, j->act, y);
}

zq_status
zq_gated(const float *gate, const float *up, int64_t m, int64_t n, zq_activation act, const zq_rows_out *out,
         int64_t *bad_row)
{
    row_jobs j = {.fn = gated_row, .x = gate, .other = up, .act = act, .m = m, .n = n, .out = out};
    return run(&j, bad_row);
}

/* The maximum is subtracted before exp, so that the largest term is 1. A row without a finite element has no maximum;
 * shifting it by 0 gives zeros for -Inf and shows +Inf and NaN in the sum. */
static int
softmax_row(const row_jobs *j, int64_t row, float *y, zq_range *range)
{
    (void)range; /* probabilities are not quantized */
    const float *x = j->x + row * j->n;
    const float max = j->K->max_f32(x, j->n);
    const float sum = j->K->exp_sum_f32(x, j->n, 1.0f, max == -INFINITY ? 0.0f : max, y);
    j->K->scale_f32(y, j->n, sum > 0.0f ? 1.0f / sum : 0.0f, y);
    return max < INFINITY && sum <= FLT_MAX;
}

zq_status
zq_softmax(const float *x, int64_t m, int64_t n, float *y, int64_t *bad_row)
{
    const zq_rows_out out = {.y = y, .quant = ZQ_QUANT_NONE};
    row_jobs j = {.fn = softmax_row, .x = x, .m = m, .n = n, .out = &out};
    return run(&j, bad_row);
}
