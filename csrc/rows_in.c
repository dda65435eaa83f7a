#include "rows_in.h"

#include <float.h>
#include <math.h>
#include <string.h>

void
zq_rows_in_init(zq_rows_in *in, const zq_linear *w, const zq_rows *x, int64_t m)
{
    *in = (zq_rows_in){.w = w, .x = x, .K = zq_active(), .m = m};
    zq_trouble_init(&in->trouble);
}

const float *
zq_read_row(const zq_rows_in *in, int64_t r, float *branched)
{
    const float *x = in->x->f32 + r * in->x->ld_f32;
    if (!in->w->in_factor) {
        return x;
    }
    in->K->shift_scale_f32(x, in->w->k, in->w->in_shift, in->w->in_factor, branched);
    return branched;
}

const float *
zq_read_row_scratch(zq_rows_in *in, int64_t r)
{
    float *branched = in->w->in_factor ? zq_scratch(ZQ_SCRATCH_ROW, (size_t)in->w->k * sizeof *branched) : NULL;
    if (in->w->in_factor && !branched) {
        atomic_store(&in->trouble.no_memory, 1);
        return NULL;
    }
    return zq_read_row(in, r, branched);
}

void
zq_code_row(zq_rows_in *in, int64_t r, const float *x, uint8_t *q, float *scale, int32_t *zero)
{
    const int64_t k = in->w->k;
    int finite;
    *scale = in->one_scale ? in->scale : 1.0f;
    *zero = in->one_scale ? in->zero : 0;
    if (in->one_scale) {
        in->K->quantize_div_f32_b8(x, k, in->scale, in->zero, 0, 255, q);
        finite = in->K->absmax_f32(x, k) <= FLT_MAX;
    }
    else {
        finite = zq_quantize_token(in->K, x, k, in->x->quant, q, scale, zero);
    }
    if (!finite) {
        zq_note_bad_row(&in->trouble, r);
    }
}

/* Positive floats order as their bit patterns do. */
static void
raise_to(_Atomic(uint32_t) *top, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t seen = atomic_load(top);
    while (bits > seen && !atomic_compare_exchange_weak(top, &seen, bits)) {
    }
}

static void
range_job(void *ctx, int64_t r)
{
    zq_rows_in *in = ctx;
    const float *x = zq_read_row_scratch(in, r);
    float lo, hi;
    if (!x) {
        return;
    }
    if (!in->K->minmax_f32(x, in->w->k, &lo, &hi)) {
        zq_note_bad_row(&in->trouble, r);
        return;
    }
    raise_to(&in->lowest, fabsf(lo));
    raise_to(&in->highest, hi);
}

/* Extremes do not depend on the order in which the rows are looked at. */
void
zq_find_scale(zq_rows_in *in)
{
    in->one_scale = in->x->f32 && in->x->quant >= ZQ_QUANT_STATIC;
    if (!in->one_scale) {
        return;
    }
    in->scale = in->w->in_scale;
    in->zero = in->w->in_zero;
    if (in->x->quant == ZQ_QUANT_STATIC) {
        return;
    }
    zq_for_rows(in->m, in->w->k, range_job, in);
    const uint32_t ends[2] = {in->lowest, in->highest};
    float range[2];
    memcpy(range, ends, sizeof range);
    zq_token_scale(in->x->quant == ZQ_QUANT_TENSOR_SYM ? ZQ_QUANT_TOKEN_SYM : ZQ_QUANT_TOKEN_ASYM, -range[0], range[1],
                   &in->scale, &in->zero);
}

void
zq_for_rows(int64_t m, int64_t row_items, zq_job_fn fn, void *ctx)
{
    if (m * row_items >= ZQ_SHARED_ITEMS) {
        zq_parallel_for(m, fn, ctx);
        return;
    }
    for (int64_t r = 0; r < m; r++) {
        fn(ctx, r);
    }
}
